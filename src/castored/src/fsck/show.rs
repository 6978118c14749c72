//! A check on the terminal: a bar with a rate while it runs, what is damaged as it is found.

use std::ops::ControlFlow;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::Tell;
use super::news::{News, Stage, Summary};

/// Where news are shown.
pub(crate) struct Show {
    json: bool,
    bar: ProgressBar,
}

impl Show {
    pub(super) fn new(json: bool) -> Self {
        let bar = if json { ProgressBar::hidden() } else { ProgressBar::no_length() };
        Self { json, bar }
    }

    fn line(&self, text: &str) {
        if !self.json {
            // The bar is not drawn over it.
            self.bar.suspend(|| println!("{text}"));
        }
    }

    /// What came of it.
    pub(super) fn end(&self, summary: &Summary) {
        self.bar.finish_and_clear();
        if self.json {
            println!("{}", serde_json::to_string_pretty(summary).unwrap_or_default());
            return;
        }
        for path in &summary.mended {
            println!("repaired: '{path}'");
        }
        for path in &summary.released {
            println!("sound again, no longer in quarantine: '{path}'");
        }
        for quarantined in &summary.quarantined {
            let how = if quarantined.withheld { "nothing of it can be read" } else { "what is damaged cannot be read" };
            println!("in quarantine ({how}): '{}': {}", quarantined.path, quarantined.reason);
        }
        let (objects, bytes, paths) = (summary.objects, HumanBytes(summary.bytes), summary.paths);
        if summary.ended {
            println!("ended early");
        } else if objects > 0 {
            println!("checked {objects} objects ({bytes}) and {paths} paths");
        } else {
            println!("checked {paths} paths");
        }
        if summary.salvaged > 0 {
            println!("{} objects were saved from damaged blocks", summary.salvaged);
        }
        match (summary.found + summary.affected, summary.left()) {
            (0, _) => println!("no damage"),
            (_, 0) => println!("all damage is repaired"),
            (_, _) if summary.repair => println!(
                "{} paths could not be repaired; they stay valid, since others may need them",
                summary.quarantined.len()
            ),
            _ => println!("{} problems, {} damaged paths; `--repair` repairs them", summary.found, summary.affected),
        }
    }
}

impl Tell for Show {
    fn tell(&self, news: News) -> ControlFlow<()> {
        match news {
            News::Stage { stage, total } => {
                let (text, bytes) = match stage {
                    Stage::Objects => ("objects", true),
                    Stage::Tables => ("index", false),
                    Stage::Contents => ("NARs", true),
                    Stage::Paths => ("paths", false),
                    Stage::Repair => ("repair", false),
                };
                let counts = match bytes {
                    true => "{bytes}/{total_bytes} ({bytes_per_sec}, {eta})",
                    false => "{pos}/{len} ({per_sec})",
                };
                let template = format!("{{msg:8}} {{bar:30}} {counts}");
                if let Ok(style) = ProgressStyle::with_template(&template) {
                    self.bar.set_style(style);
                }
                self.bar.reset();
                self.bar.set_length(total);
                self.bar.set_message(text);
            }
            News::Done(done) => self.bar.set_position(done),
            News::Problem(text) => self.line(&text),
            News::Affected { message, .. } => self.line(&message),
            News::Log(text) => self.line(text.trim_end()),
            // Whoever asked has them from the answer.
            News::End(_) | News::Failed(_) => {}
        }
        ControlFlow::Continue(())
    }
}
