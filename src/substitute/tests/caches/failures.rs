//! Caches that say or send what is not so. Nothing of it ever becomes valid.

use nix_compat::hash::{Algorithm, Hash, NarHash};
use nix_compat::narinfo::Compression;
use substitute::Outcome;

use crate::rig::{Cache, Entry, Rig, compress, key, nar};

async fn refused(cache: &Cache, entry: &Entry, expected: Outcome, says: &str) {
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&[&cache.url()], &[], entry).await;
    assert_eq!(outcome, expected, "{}", told.lines());
    assert!(told.lines().contains(says), "{}", told.lines());
    // A source that is right comes into play.
    let right = Cache::new();
    let entry = right.add(entry.path().name(), &entry.contents, &[]);
    let (outcome, told) = rig.fetch(&[&cache.url(), &format!("{}?priority=99", right.url())], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(rig.has(&entry));
}

fn sign(cache: &Cache, entry: &mut Entry, seed: u8) {
    let info = &mut entry.narinfo.info;
    info.signatures = [key(seed).sign(info.fingerprint(&cache.store_dir).as_bytes())].into();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_hash_and_size_of_the_nar() {
    let cache = Cache::new();
    let mut entry = cache.entry("x", b"contents", &[]);
    entry.narinfo.info.nar_hash = NarHash::from([7; 32]);
    sign(&cache, &mut entry, 1);
    cache.publish(&mut entry);
    refused(&cache, &entry, Outcome::Failed, "hash mismatch importing path").await;

    let mut entry = cache.entry("x", b"contents", &[]);
    entry.narinfo.info.nar_size += 8;
    sign(&cache, &mut entry, 1);
    cache.publish(&mut entry);
    refused(&cache, &entry, Outcome::Failed, "size mismatch importing path").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_hash_and_size_of_the_file() {
    let cache = Cache::new();
    let mut entry = cache.entry("x", b"contents", &[]);
    cache.publish(&mut entry);
    let size = entry.narinfo.file_size;
    entry.narinfo.file_hash = Some(Hash::of(Algorithm::Sha256, b"another"));
    cache.describe(&entry);
    refused(&cache, &entry, Outcome::Failed, "has the hash").await;
    entry.narinfo.file_hash = None;
    for (wrong, says) in [(size.map(|n| n + 1), "has the size"), (size.map(|n| n - 1), "is longer than")] {
        entry.narinfo.file_size = wrong;
        cache.describe(&entry);
        refused(&cache, &entry, Outcome::Failed, says).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_and_prolonged_files() {
    let cache = Cache::new();
    for compression in [Compression::None, Compression::Xz, Compression::Zstd, Compression::Gzip, Compression::Lz4] {
        let plain = cache.entry("x", &b"contents".repeat(1000), &[]);
        let mut entry = Cache::described(plain.narinfo.info, &plain.contents, compression);
        cache.publish(&mut entry);
        (entry.narinfo.file_hash, entry.narinfo.file_size) = (None, None);
        cache.describe(&entry);
        let file = cache.path().join(entry.narinfo.url());
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        refused(&cache, &entry, Outcome::Failed, "error: ").await;
        let longer = compress(compression, &[nar(&plain.contents), b"more".to_vec()].concat());
        std::fs::write(&file, longer).unwrap();
        refused(&cache, &entry, Outcome::Failed, "error: ").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_file_that_becomes_a_large_archive() {
    let cache = Cache::new();
    let mut entry = cache.entry("x", b"small", &[]);
    cache.publish(&mut entry);
    let large = nar(&vec![0; 64 << 20]);
    for compression in [Compression::Zstd, Compression::Xz, Compression::Gzip] {
        let mut entry = Cache::described(entry.narinfo.info.clone(), b"small", compression);
        let bomb = compress(compression, &large);
        assert!(bomb.len() < 1 << 20);
        std::fs::write(cache.path().join(entry.narinfo.url()), bomb).unwrap();
        (entry.narinfo.file_hash, entry.narinfo.file_size) = (None, None);
        cache.describe(&entry);
        refused(&cache, &entry, Outcome::Failed, "the archive is longer than").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures() {
    let cache = Cache::new();
    let mut entry = cache.entry("x", b"contents", &[]);
    sign(&cache, &mut entry, 2);
    cache.publish(&mut entry);
    let says = "it's not signed by any of the keys in 'trusted-public-keys'";
    refused(&cache, &entry, Outcome::Unavailable, says).await;
    entry.narinfo.info.signatures.clear();
    cache.describe(&entry);
    refused(&cache, &entry, Outcome::Unavailable, says).await;
    // A signature for other contents.
    let other = cache.entry("x", b"other", &[]);
    entry.narinfo.info.signatures = other.narinfo.info.signatures;
    cache.describe(&entry);
    refused(&cache, &entry, Outcome::Unavailable, says).await;

    // Those who need none.
    let trusted = format!("{}?trusted=1", cache.url());
    assert_eq!(Rig::new().fetch(&[&trusted], &[], &entry).await.0, Outcome::Substituted);
    let url = cache.url();
    assert_eq!(Rig::new().fetch(&[&url], &[("require-sigs", "false")], &entry).await.0, Outcome::Substituted);
    let public = key(2).public_key().to_string();
    sign(&cache, &mut entry, 2);
    cache.describe(&entry);
    assert_eq!(Rig::new().fetch(&[&url], &[("trusted-public-keys", &public)], &entry).await.0, Outcome::Substituted);
}

#[tokio::test(flavor = "multi_thread")]
async fn content_addresses() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let mut entry = cache.by_contents("x", b"contents");
    cache.publish(&mut entry);
    assert_eq!(rig.fetch(&[&cache.url()], &[], &entry).await.0, Outcome::Substituted);
    // The same claim for other contents.
    let mut other = cache.by_contents("x", b"contents");
    let forged = nar(b"forged");
    other.narinfo.info.nar_hash = NarHash::from(nix_compat::hash::sha256(&forged));
    other.narinfo.info.nar_size = forged.len() as u64;
    other.contents = b"forged".to_vec();
    cache.publish(&mut other);
    let (outcome, told) = Rig::new().fetch(&[&cache.url()], &[], &other).await;
    assert_eq!(outcome, Outcome::Failed);
    assert!(told.lines().contains("ca hash mismatch importing path"), "{}", told.lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn narinfos_of_other_paths_and_of_none() {
    let cache = Cache::new();
    let entry = cache.entry("x", b"contents", &[]);
    let other = cache.add("y", b"contents", &[]);
    let name = |entry: &Entry| cache.path().join(format!("{}.narinfo", entry.path().hash_part()));
    std::fs::copy(name(&other), name(&entry)).unwrap();
    refused(&cache, &entry, Outcome::Unavailable, "asked 'file://").await;
    for corrupt in ["", "StorePath: x", "garbage\n"] {
        std::fs::write(name(&entry), corrupt).unwrap();
        refused(&cache, &entry, Outcome::Unavailable, "is corrupt").await;
    }
    std::fs::write(name(&entry), vec![b'x'; 2 << 20]).unwrap();
    refused(&cache, &entry, Outcome::Unavailable, "is longer than").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_cache_cannot_be_lazy() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"contents", &[]);
    let (outcome, told) = rig.fetch(&[&format!("{}?lazy=true", cache.url())], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(told.lines().contains("cannot be lazy"), "{}", told.lines());
    assert!(rig.has(&entry));
}
