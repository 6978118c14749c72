use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use super::{BlockBuilder, BlockError, FILE_HEADER, Form, PackError, Packs, Place, Recovery};
use crate::Digest;
use crate::index::{DataFiles, Index, IndexOptions, Table};
use crate::objects::{ObjectKey, ObjectKind};

/// A table to name in rows that these tests read themselves.
fn some_table() -> Table {
    let dir = tempfile::tempdir().unwrap();
    Index::open(&dir.path().join("index"), &IndexOptions::default()).unwrap().table("lengths").unwrap()
}

fn open(dir: &Path, seal_at: u64, committed: &HashMap<u32, u64>) -> Result<(Packs, Recovery), PackError> {
    Packs::open(dir.join("packs"), seal_at, some_table(), committed, &HashMap::new())
}

fn block(objects: &[&[u8]]) -> BlockBuilder {
    let mut block = BlockBuilder::default();
    for contents in objects {
        block.push(ObjectKey { kind: ObjectKind::Chunk, digest: Digest::of(contents) }, contents);
    }
    block
}

fn append(packs: &Packs, objects: &[&[u8]]) -> Place {
    packs.append(block(objects).encode(Form::Quick).unwrap()).unwrap().place
}

/// Makes the packs durable; what the index would have recorded of them by then.
fn commit(packs: &Packs, committed: &mut HashMap<u32, u64>) {
    for row in packs.make_durable().unwrap() {
        let number = u32::from_be_bytes(row.key[..].try_into().unwrap());
        committed.insert(number, u64::from_le_bytes(row.value[..].try_into().unwrap()));
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_pack_has_the_documented_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (packs, _) = open(dir.path(), 1 << 20, &HashMap::new()).unwrap();
    let place = append(&packs, &[b"a", b"bc"]);
    assert_eq!(place, Place { pack: 0, offset: 32, length: 40 + 2 * 37 + 3 });
    let bytes = std::fs::read(dir.path().join("packs/00000000.pack")).unwrap();
    let (header, block) = bytes.split_at(32);
    assert_eq!(header[..24], *b"castpack\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(header[24..], xxhash_rust::xxh3::xxh3_64(&header[..24]).to_le_bytes());
    assert_eq!(block[..24], *b"cBLK\0\0\0\0\x02\0\0\0\x03\0\0\0\x03\0\0\0\0\0\0\0");
    assert_eq!(block[24..32], xxhash_rust::xxh3::xxh3_64(b"abc").to_le_bytes());
    let covered = [&block[..32], &block[40..114]].concat();
    assert_eq!(block[32..40], xxhash_rust::xxh3::xxh3_64_with_seed(&covered, 32).to_le_bytes());
    assert_eq!(block[40], 1);
    assert_eq!(block[41..73], *Digest::of(b"a").as_bytes());
    assert_eq!(block[73..77], 1_u32.to_le_bytes());
    assert_eq!(block[77], 1);
    assert_eq!(block[78..110], *Digest::of(b"bc").as_bytes());
    assert_eq!(block[110..114], 2_u32.to_le_bytes());
    assert_eq!(block[114..], *b"abc");
}

#[test]
fn packs_are_sealed_and_continued() {
    let dir = tempfile::tempdir().unwrap();
    let mut committed = HashMap::new();
    let mut places = Vec::new();
    for round in 0..3_u64 {
        let (packs, recovery) = open(dir.path(), 10_000, &committed).unwrap();
        assert_eq!(recovery, Recovery::default());
        for number in 0..5 {
            let contents = noise(round * 5 + number, 3000);
            places.push((append(&packs, &[&contents]), contents));
        }
        // Larger than a pack should be: it gets one to itself.
        let contents = noise(round + 1000, 20_000);
        places.push((append(&packs, &[&contents]), contents));
        commit(&packs, &mut committed);
        for (place, contents) in &places {
            assert_eq!(packs.read(*place).unwrap(), contents);
        }
    }
    assert!(committed.len() > 5);
    assert!(committed.values().filter(|&&length| length > 10_000).count() == 3);
}

#[test]
fn a_tail_that_was_not_committed_is_cut_off_and_unknown_packs_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut committed = HashMap::new();
    let (packs, _) = open(dir.path(), 10_000, &committed).unwrap();
    let kept = append(&packs, &[b"kept"]);
    commit(&packs, &mut committed);
    append(&packs, &[b"lost"]);
    append(&packs, &[&noise(1, 9_990)]);
    drop(packs);
    std::fs::write(dir.path().join("packs/notes.txt"), "not ours").unwrap();
    assert!(dir.path().join("packs/00000001.pack").exists());

    let (packs, recovery) = open(dir.path(), 10_000, &committed).unwrap();
    assert_eq!(recovery, Recovery { truncated: 1, deleted: 1 });
    assert!(!dir.path().join("packs/00000001.pack").exists());
    assert!(dir.path().join("packs/notes.txt").exists());
    assert_eq!(packs.read(kept).unwrap(), b"kept"[..]);
    let after = append(&packs, &[b"after"]);
    assert_eq!((after.pack, after.offset), (0, committed[&0]));
    assert_eq!(packs.read(after).unwrap(), b"after"[..]);
}

#[test]
fn a_pack_that_lost_committed_data_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut committed = HashMap::new();
    let (packs, _) = open(dir.path(), 10_000, &committed).unwrap();
    append(&packs, &[b"something"]);
    commit(&packs, &mut committed);
    drop(packs);
    let path = dir.path().join("packs/00000000.pack");
    let length = committed[&0];
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    match open(dir.path(), 10_000, &committed).map(|_| ()) {
        Err(PackError::Short { path: named, actual, committed }) => {
            assert_eq!((named, actual, committed), (path.clone(), length - 1, length));
        }
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(&path).unwrap();
    let missing = open(dir.path(), 10_000, &committed).map(|_| ());
    assert!(matches!(missing, Err(PackError::Short { actual: 0, .. })));
}

#[test]
fn another_version_is_told_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut committed = HashMap::new();
    let (packs, _) = open(dir.path(), 10_000, &committed).unwrap();
    append(&packs, &[b"something"]);
    commit(&packs, &mut committed);
    drop(packs);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(dir.path().join("packs/00000000.pack")).unwrap();
    file.write_all_at(&[2], 8).unwrap();
    // A damaged header is for a check to restore, which needs the store open.
    let (packs, _) = open(dir.path(), 10_000, &committed).unwrap();
    assert!(matches!(packs.check_header(0), Err(PackError::Header(_))));
    drop(packs);
    let mut header = [0; FILE_HEADER];
    file.read_exact_at(&mut header, 0).unwrap();
    file.write_all_at(&xxhash_rust::xxh3::xxh3_64(&header[..24]).to_le_bytes(), 24).unwrap();
    let newer = open(dir.path(), 10_000, &committed).map(|_| ());
    assert!(matches!(newer, Err(PackError::Version { version: 2, .. })));
}

#[test]
fn a_block_in_another_place_is_not_taken_for_the_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let (packs, _) = open(dir.path(), 1 << 20, &HashMap::new()).unwrap();
    let first = append(&packs, &[b"first"]);
    let second = append(&packs, &[b"other"]);
    assert_eq!(first.length, second.length);
    let path = dir.path().join("packs/00000000.pack");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; first.length as usize];
    file.read_exact_at(&mut bytes, first.offset).unwrap();
    file.write_all_at(&bytes, second.offset).unwrap();
    assert_eq!(packs.read(first).unwrap(), b"first"[..]);
    assert!(matches!(packs.read(second), Err(PackError::Block { source: BlockError::Head, .. })));
}

#[test]
fn a_deleted_pack_is_gone_for_those_who_come_late() {
    let dir = tempfile::tempdir().unwrap();
    let (packs, _) = open(dir.path(), 1 << 20, &HashMap::new()).unwrap();
    let place = append(&packs, &[b"a"]);
    assert_eq!(packs.read(place).unwrap(), b"a"[..]);
    assert!(packs.seal(0));
    packs.make_durable().unwrap();
    assert_eq!(packs.unlink(0).unwrap(), Some(place.offset + u64::from(place.length)));
    assert!(matches!(packs.read(place), Err(PackError::Gone(0))));
    assert_eq!(append(&packs, &[b"a"]).pack, 1, "numbers are not used twice");
}

#[test]
fn a_pack_with_a_landing_block_is_not_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let (packs, _) = open(dir.path(), 1 << 20, &HashMap::new()).unwrap();
    let landing = packs.append(block(&[b"a"]).encode(Form::Quick).unwrap()).unwrap();
    assert!(!packs.seal(0));
    drop(landing);
    assert!(packs.seal(0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// One flipped bit anywhere in a block is an error, whatever the block holds; so is any cut.
    #[test]
    fn damage_is_noticed(
        shape in prop::collection::vec((0..3000_usize, any::<bool>()), 0..12),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u32,
        offset in 0..1_u64 << 40,
    ) {
        let contents: Vec<Vec<u8>> = shape
            .iter()
            .enumerate()
            .map(|(seed, &(length, random))| if random { noise(seed as u64, length) } else { vec![b'x'; length] })
            .collect();
        let built = block(&contents.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut encoded = built.encode(Form::Quick).unwrap();
        let bytes = encoded.at(offset).to_vec();
        prop_assert_eq!(super::block::decode(bytes.clone(), offset).unwrap(), contents.concat());

        let mut flipped = bytes.clone();
        flipped[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(super::block::decode(flipped, offset).is_err());
        prop_assert!(super::block::decode(bytes[..at.index(bytes.len())].to_vec(), offset).is_err());
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(super::block::decode(longer, offset).is_err());
        prop_assert!(super::block::decode(bytes, offset + 1).is_err());
    }

    /// What a block's start decodes to is that of the whole, whatever is cut off behind it, or nothing; and no damage makes
    /// it panic.
    #[test]
    fn a_start_is_that_of_the_whole(
        text in "[a-f]{1,40}",
        times in 1..4000_usize,
        form in prop::sample::select(vec![Form::Quick, Form::Dense]),
        wanted in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
    ) {
        let contents: Vec<u8> = (0..times).flat_map(|n| format!("{text}{n}").into_bytes()).collect();
        let mut bytes = block(&[&contents]).encode(form).unwrap().at(7).to_vec();
        let wanted = wanted.index(contents.len() + 1);
        let start = super::block::decode_start(&bytes, wanted);
        let compressed = bytes[4] == 1;
        prop_assert_eq!(start.is_some(), compressed && wanted <= contents.len() / 4 * 3);
        prop_assert!(start.is_none_or(|start| start == contents[..wanted]));
        let at = at.index(bytes.len());
        let of_less = super::block::decode_start(&bytes[..at], wanted);
        prop_assert!(of_less.is_none_or(|start| start == contents[..wanted]));
        bytes[at] ^= 1;
        let _ = super::block::decode_start(&bytes, wanted);
    }

    #[test]
    fn arbitrary_bytes_are_no_block(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(super::block::decode(bytes.clone(), 0).is_err());
        let mut begun = b"cBLK".to_vec();
        begun.extend(bytes);
        prop_assert!(super::block::decode(begun, 0).is_err());
    }
}
