//! `castored stats`: the sizes of a store, from its daemon or, when none runs, from its directory.

use std::path::Path;
use std::process::ExitCode;

use ::daemon::Locations;
use remote::ClientError;

use crate::failure::Failure;
use crate::plot;
use crate::sizes::serve::{Answer, Question, ask};

pub(crate) fn run(locations: &Locations, json: bool, plot: Option<&Path>) -> Result<ExitCode, Failure> {
    let Answer::Stats(stats) = ask(locations, &Question::Stats)? else {
        return Err(ClientError::Protocol("the answer to another question".to_owned()).into());
    };
    if let Some(file) = plot {
        plot::write(&stats, file)?;
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&stats).unwrap_or_default());
    } else {
        stats.print();
    }
    Ok(ExitCode::SUCCESS)
}
