//! `compat-tests/functional [--release VERSION] [--jobs N] [--bless] [TEST...]`: stock Nix's functional suite against
//! castored. Ends with an error when a test does other than the list says; `--bless` writes the list instead.

use std::process::ExitCode;

use compat_tests::functional::{self, Options, RELEASES};
use compat_tests::{Error, Result, machine};

fn main() -> ExitCode {
    match functional() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("the functional suite cannot be run: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything is as the lists say.
fn functional() -> Result<bool> {
    let options = options()?;
    if let Some(reason) = machine::obstacle() {
        return Err(Error::Wrong(reason.into()));
    }
    let report = functional::run(machine::prepare()?, &options)?;
    println!();
    for wrong in &report.wrong {
        println!("WRONG {wrong}");
    }
    println!("functional suite: {}", report.summary);
    Ok(report.wrong.is_empty())
}

fn options() -> Result<Options> {
    let mut options = Options { version: RELEASES[0].to_owned(), ..Options::default() };
    let mut arguments = std::env::args().skip(1);
    let missing = |name: &str| Error::Wrong(format!("{name} needs a value"));
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bless" => options.bless = true,
            "--release" => options.version = arguments.next().ok_or_else(|| missing("--release"))?,
            "--jobs" => {
                let jobs = arguments.next().ok_or_else(|| missing("--jobs"))?;
                options.jobs = jobs.parse().map_err(|e| Error::Wrong(format!("--jobs {jobs}: {e}")))?;
            }
            other if other.starts_with('-') => return Err(Error::Wrong(format!("unknown option {other}"))),
            test => options.tests.push(test.trim_end_matches(".sh").to_owned()),
        }
    }
    Ok(options)
}
