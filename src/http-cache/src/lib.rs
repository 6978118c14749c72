//! The store as a binary cache over HTTP, as stock clients read one, with pages for people.
//!
//! | module | |
//! |---|---|
//! | [`server`] | the socket, connections, their end |
//! | `pace` | cuts off clients that do not read |
//! | `target` | what a URL names |
//! | `conditions` | ranges, validators and encodings that a request asks for |
//! | `answer` | responses: which, with what headers |
//! | `cache` | what the store says: narinfos, realisations |
//! | `render` | large bodies, made on threads of their own into a bounded channel |
//! | `listing` | `<hash>.ls` |
//! | `page` | HTML |
//! | `failure` | what goes wrong here |
//! | `push` | what trusted pushers put into the store |
//!
//! Nothing that comes in over HTTP changes the store, unless it comes with a token that the administrator has given out
//! ([`Tokens`]). Other peers are strangers; what they can make the process hold is in [`limits`].

mod answer;
mod cache;
mod conditions;
mod failure;
pub mod limits;
mod listing;
mod pace;
mod page;
mod push;
mod render;
pub mod server;
mod target;

pub use cache::Served;
pub use limits::Limits;
pub use push::{TokenError, Tokens};
pub use server::{ListenError, Server};
