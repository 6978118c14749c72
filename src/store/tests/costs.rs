//! What paths cost, in stores whose answer is known.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Fixture, info};
use nix_compat::nar::NarWriter;
use nix_compat::store_path::StorePath;
use store::{Error, MAX_COSTS};

/// Bytes that do not pack, different for each seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    });
    step.take(length).collect()
}

fn add_file(fixture: &Fixture, name: &str, contents: &[u8], references: &[&StorePath]) -> (StorePath, u64) {
    let mut nar = NarWriter::new(Vec::new());
    nar.regular_header(false, contents.len() as u64).unwrap();
    nar.contents(contents).unwrap();
    nar.end_regular().unwrap();
    let nar = nar.finish().unwrap();
    let info = info(name, &nar, references);
    fixture.store().add_with_info(info.clone(), &mut &nar[..]).unwrap();
    (info.path, nar.len() as u64)
}

/// Whether it is as long as what does not pack, and a little for header, table and record of its block.
fn is_about(stored: u64, length: u64) -> bool {
    (length..length + 1000).contains(&stored)
}

#[test]
fn what_only_a_path_uses_and_what_it_shares_is_told_for_it_and_for_its_closure() {
    let fixture = Fixture::new();
    let (library, same) = (noise(1, 60_000), noise(1, 60_000));
    let (base, base_size) = add_file(&fixture, "base", &library, &[]);
    let (program, program_size) = add_file(&fixture, "program", &noise(2, 40_000), &[&base]);
    let (alone, _) = add_file(&fixture, "alone", &noise(3, 30_000), &[]);
    let store = fixture.store();

    let costs = store.costs(&[program.clone(), base.clone(), alone.clone()]).unwrap();
    let [of_program, of_base, of_alone] = &costs[..] else { panic!("{costs:?}") };
    assert_eq!((&of_program.path, of_program.nar_size, of_program.closure_paths), (&program, program_size, 2));
    assert_eq!(of_program.closure_nar_size, program_size + base_size);
    assert!(is_about(of_program.cost.unique, 40_000) && of_program.cost.shared == 0, "{of_program:?}");
    assert!(is_about(of_program.closure_cost.unique, 100_000) && of_program.closure_cost.shared == 0);
    assert!(is_about(of_base.cost.unique, 60_000) && of_base.cost == of_base.closure_cost);
    assert!(is_about(of_alone.cost.unique, 30_000) && of_alone.closure_paths == 1);
    assert!(is_about(store.distinct_bytes().unwrap(), 130_000));

    // The same contents again: they are nobody's own any more, but nothing is stored.
    let before = store.engine().stats().raw_bytes;
    let (again, _) = add_file(&fixture, "again", &same, &[]);
    assert!(store.engine().stats().raw_bytes - before < 1000);
    let costs = store.costs(&[program, base, again]).unwrap();
    let [of_program, of_base, of_again] = &costs[..] else { panic!("{costs:?}") };
    assert!(is_about(of_program.cost.unique, 40_000));
    assert!(is_about(of_program.closure_cost.unique, 40_000) && is_about(of_program.closure_cost.shared, 60_000));
    for of in [of_base, of_again] {
        assert!(of.cost.unique == 0 && is_about(of.cost.shared, 60_000), "{of:?}");
    }
    assert!(is_about(store.distinct_bytes().unwrap(), 130_000));
}

#[test]
fn chunks_are_shared_where_files_are_not() {
    let fixture = Fixture::new();
    let old = noise(4, 2_000_000);
    let new = [&old[..1_000_000], b"inserted", &old[1_000_000..]].concat();
    let (first, _) = add_file(&fixture, "first", &old, &[]);
    let (second, _) = add_file(&fixture, "second", &new, &[]);
    let store = fixture.store();
    let costs = store.costs(&[first, second]).unwrap();
    for of in &costs {
        assert!(of.cost.shared > 1_500_000 && of.cost.unique > 0, "{of:?}");
    }
    assert_eq!(costs[0].cost.shared, costs[1].cost.shared);
    // As files they have nothing in common.
    assert_eq!(store.distinct_bytes().unwrap(), 4_000_008);
    assert!(store.engine().stats().raw_bytes < 2_500_000);
}

#[test]
fn what_cannot_be_told_is_refused() {
    let fixture = Fixture::new();
    let (path, _) = add_file(&fixture, "path", b"contents", &[]);
    let nowhere = StorePath::from_parts([1; 20], "nowhere").unwrap();
    assert!(matches!(fixture.store().costs(&[nowhere]), Err(Error::NotValid(_))));
    let many = vec![path; MAX_COSTS + 1];
    assert!(matches!(fixture.store().costs(&many), Err(Error::TooManyCosts { .. })));
    assert_eq!(fixture.store().costs(&many[1..]).unwrap().len(), MAX_COSTS);
}
