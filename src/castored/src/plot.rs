//! A picture of where the bytes go: SVG, without scripts or fonts of its own, for light and dark.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;

use crate::failure::Failure;
use crate::sizes::Stats;

/// The picture's width, and that of the longest bar; in pixels, as all that follows.
const WIDTH: u32 = 720;
const LONGEST: f64 = 680.0;
/// From one bar to the next, and of each its height.
const STEP: u32 = 64;
const BAR: u32 = 24;
/// Where everything begins: from the left, and the first bar from the top.
const LEFT: u32 = 20;
const TOP: u32 = 72;

const STYLE: &str = "\
text { font: 14px system-ui, sans-serif; fill: #222 }
.title { font-size: 18px; font-weight: 600 }
.size { font-weight: 600 }
.note { fill: #666 }
.ground { fill: #fff }
.whole { fill: #e4e4e8 }
.bar { fill: #3b6fb6 }
@media (prefers-color-scheme: dark) {
  text { fill: #eee }
  .note { fill: #aaa }
  .ground { fill: #1b1b1f }
  .whole { fill: #33333a }
  .bar { fill: #7aa7e8 }
}";

/// Draws the sizes.
fn draw(stats: &Stats) -> String {
    let distinct = stats.distinct_bytes.map(|bytes| ("equal files once", bytes));
    let bars: Vec<(&str, u64)> = [("as archives (NAR)", stats.nar_bytes)]
        .into_iter()
        .chain(distinct)
        .chain([("equal chunks once", stats.unique_bytes), ("on disk, compressed", stats.stored_bytes)])
        .collect();
    let longest = bars.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0).max(1) as f64;
    let height = TOP + STEP * bars.len() as u32;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<title>Where the bytes of a castored store go</title>\n<style>\n{STYLE}\n\
         </style>\n<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n<text class=\"title\" x=\"{LEFT}\" \
         y=\"36\">{} store paths in {} packs</text>\n",
        stats.paths, stats.packs
    );
    for (number, (name, bytes)) in bars.iter().enumerate() {
        let y = TOP + STEP * number as u32;
        let (text, bar) = (y + 4, y + 12);
        let width = (*bytes as f64 / longest * LONGEST).max(1.0);
        let share = match stats.nar_bytes {
            0 => String::new(),
            nar => format!(", {:.1} %", *bytes as f64 * 100.0 / nar as f64),
        };
        svg.push_str(&format!(
            "<text x=\"{LEFT}\" y=\"{text}\">{name}: <tspan class=\"size\">{}</tspan><tspan \
             class=\"note\">{share}</tspan></text>\n<rect class=\"whole\" x=\"{LEFT}\" y=\"{bar}\" width=\"{LONGEST}\" \
             height=\"{BAR}\" rx=\"3\"/>\n<rect class=\"bar\" x=\"{LEFT}\" y=\"{bar}\" width=\"{width:.1}\" \
             height=\"{BAR}\" rx=\"3\"/>\n",
            HumanBytes(*bytes)
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Writes the picture: beside its place first, so that whatever was there before stays whole until it is replaced.
pub(crate) fn write(stats: &Stats, file: &Path) -> Result<(), Failure> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(name);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&new)
        .and_then(|mut out: File| out.write_all(draw(stats).as_bytes()))
        .map_err(Failure::file("write", &new))
        .and_then(|()| fs::rename(&new, file).map_err(Failure::file("write", file)));
    if written.is_err() {
        // It may not even have been made.
        let _ = fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

    use super::*;

    fn stats() -> Stats {
        Stats {
            paths: 3,
            packs: 1,
            nar_bytes: 4 << 20,
            distinct_bytes: Some(3 << 20),
            unique_bytes: 2 << 20,
            stored_bytes: 1 << 20,
            ..Stats::default()
        }
    }

    #[test]
    fn bars_are_as_long_as_the_sizes_they_stand_for() {
        let svg = draw(&stats());
        let bars: Vec<&str> = svg.lines().filter(|line| line.contains("class=\"bar\"")).collect();
        let widths: Vec<&str> =
            bars.iter().map(|bar| bar.split("width=\"").nth(1).unwrap().split('"').next().unwrap()).collect();
        assert_eq!(widths, ["680.0", "510.0", "340.0", "170.0"]);
        for label in ["4.00 MiB", "3.00 MiB", "75.0 %", "2.00 MiB", "50.0 %", "1.00 MiB", "25.0 %", "3 store paths"] {
            assert!(svg.contains(label), "{label} is missing");
        }
        assert!(svg.contains("prefers-color-scheme: dark"));
        let empty = draw(&Stats::default());
        assert!(!empty.contains("NaN") && !empty.contains("inf"));
    }

    #[test]
    fn what_was_there_is_replaced_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plot.svg");
        fs::write(&file, "old").unwrap();
        write(&stats(), &file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), draw(&stats()));
        // A directory in its place cannot be replaced.
        let taken = dir.path().join("taken");
        fs::create_dir(&taken).unwrap();
        write(&stats(), &taken).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
