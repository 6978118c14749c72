//! What processes use, as the kernel tells it. Bytes.

use std::fs;

use nix::unistd::Pid;

use crate::error::{Context, Error, Result};

/// The share of memory that is a process's own, pages of several processes divided among them.
pub fn pss(pid: Pid) -> Result<u64> {
    field(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

/// The same summed over a process and its children: stock Nix has one for each connection.
pub fn pss_with_children(pid: Pid) -> Result<u64> {
    let mut total = pss(pid)?;
    for child in children(pid) {
        // One that has ended in between uses nothing.
        total += pss(child).unwrap_or(0);
    }
    Ok(total)
}

/// Memory that is in use now.
pub fn rss(pid: Pid) -> Result<u64> {
    field(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// The most that was ever in use, or since [`reset_peak`].
pub fn peak(pid: Pid) -> Result<u64> {
    field(&format!("/proc/{pid}/status"), "VmHWM:")
}

/// Lets [`peak`] begin anew.
pub fn reset_peak(pid: Pid) -> Result<()> {
    let file = format!("/proc/{pid}/clear_refs");
    fs::write(&file, "5").doing("writing", &file)
}

/// Threads of a process.
pub fn threads(pid: Pid) -> Result<u64> {
    number(&format!("/proc/{pid}/status"), "Threads:")
}

/// Children that any of a process's threads started.
pub fn children(pid: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
        .map(Pid::from_raw)
        .collect()
}

fn field(file: &str, name: &str) -> Result<u64> {
    Ok(number(file, name)? * 1024)
}

fn number(file: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(file).doing("reading", file)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    value.ok_or_else(|| Error::Wrong(format!("{file} has no {name}")))
}
