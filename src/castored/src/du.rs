//! `castored du`: what store paths cost on disk, alone and with all they need.

use std::process::ExitCode;

use ::daemon::Locations;
use indicatif::HumanBytes;
use remote::ClientError;

use crate::failure::Failure;
use crate::fsck::base_name;
use crate::sizes::serve::{Answer, Question, ask};

pub(crate) fn run(locations: &Locations, json: bool, paths: &[String]) -> Result<ExitCode, Failure> {
    let names = paths.iter().map(|path| base_name(locations, path)).collect::<Result<_, _>>()?;
    let Answer::Costs(sizes) = ask(locations, &Question::Costs(names))? else {
        return Err(ClientError::Protocol("the answer to another question".to_owned()).into());
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&sizes).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    let line = |what: &str, numbers: [u64; 3]| {
        let [nar, unique, shared] = numbers.map(|bytes| HumanBytes(bytes).to_string());
        println!("{nar:>12} {unique:>12} {shared:>12}  {what}");
    };
    println!("{:>12} {:>12} {:>12}", "NAR size", "its own", "shared");
    for path in &sizes {
        line(&path.path, [path.nar_bytes, path.unique_bytes, path.shared_bytes]);
        let closure = &path.closure;
        let what = format!("  and all it needs, {} paths", closure.paths);
        line(&what, [closure.nar_bytes, closure.unique_bytes, closure.shared_bytes]);
    }
    Ok(ExitCode::SUCCESS)
}
