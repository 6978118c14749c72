//! What caches have, in all forms.

use nix_compat::narinfo::Compression;
use nix_compat::store_path::StoreDir;
use substitute::{Outcome, Substituter, Wanted};

use crate::rig::{Cache, Rig, compress, nar};
use crate::server::{Server, response};

const COMPRESSIONS: [Compression; 7] = [
    Compression::None,
    Compression::Xz,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Gzip,
    Compression::Zstd,
    Compression::Lz4,
];

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_from_a_directory_and_a_server() {
    let cache = Cache::new();
    let server = Server::new(cache.path());
    let contents: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    for url in [cache.url(), server.url()] {
        let rig = Rig::new();
        for compression in COMPRESSIONS {
            let plain = cache.entry(&format!("in-{compression}"), &contents, &[]);
            let mut entry = Cache::described(plain.narinfo.info, &contents, compression);
            cache.publish(&mut entry);
            let (outcome, told) = rig.fetch(&[&url], &[], &entry).await;
            assert_eq!(outcome, Outcome::Substituted, "{compression}: {}", told.lines());
            assert!(rig.has(&entry));
            assert_eq!(rig.fetch(&[&url], &[], &entry).await.0, Outcome::AlreadyValid);
        }
    }
}

/// What `cat` makes of compressed files is a compressed file as well, also in the middle of a large one.
#[tokio::test(flavor = "multi_thread")]
async fn files_of_several_members() {
    let cache = Cache::new();
    let rig = Rig::new();
    let large: Vec<u8> = (0..17_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let forms = [Compression::Xz, Compression::Gzip, Compression::Bzip2, Compression::Zstd];
    for (name, contents, forms) in [("small", &large[..5_000], &forms[..]), ("large", &large, &forms[..1])] {
        for form in forms {
            let plain = cache.entry(&format!("{name}-{form}"), contents, &[]);
            let mut entry = Cache::described(plain.narinfo.info, contents, *form);
            let archive = nar(contents);
            let parts = archive.chunks(archive.len() / 3 + 1).map(|part| compress(*form, part));
            std::fs::write(cache.path().join(entry.narinfo.url()), parts.collect::<Vec<_>>().concat()).unwrap();
            (entry.narinfo.file_hash, entry.narinfo.file_size) = (None, None);
            cache.describe(&entry);
            let (outcome, told) = rig.fetch(&[&cache.url()], &[], &entry).await;
            assert_eq!(outcome, Outcome::Substituted, "{name} {form}: {}", told.lines());
            assert!(rig.has(&entry));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_of_s3_is_a_cache() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("in-a-bucket", b"contents", &[]);
    let dir = cache.path();
    // A bucket that everybody may read; what is signed is for the tests of downloads.
    let server = Server::with(dir.clone(), move |path, _| {
        let file = path.strip_prefix("/bucket/below/").map(|name| std::fs::read(dir.join(name)));
        match file {
            Some(Ok(body)) => Some(response("200 OK", "", &body)),
            // As a bucket answers that does not list what it has.
            _ => Some(response("403 Forbidden", "", b"<Error/>")),
        }
    });
    let url = format!("s3://bucket/below?endpoint={}&scheme=http&region=eu-west-1&profile=none", server.address);
    let (outcome, told) = rig.fetch(&[&url], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    let absent = cache.entry("absent", b"x", &[]);
    assert_eq!(rig.fetch(&[&url], &[], &absent).await.0, Outcome::Unavailable);
    let elsewhere = url.replace("below", "elsewhere");
    let (outcome, told) = rig.fetch(&[&elsewhere], &[], &absent).await;
    assert_eq!(outcome, Outcome::Unavailable);
    assert_eq!(told.lines(), "warning: 's3://bucket/elsewhere' does not appear to be a binary cache");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compression_that_nobody_knows_is_told() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let plain = cache.entry("odd", b"odd", &[]);
    let entry = Cache::described(plain.narinfo.info, b"odd", Compression::Lrzip);
    std::fs::write(cache.path().join(entry.narinfo.url()), b"anything").unwrap();
    cache.describe(&entry);
    let (outcome, told) = rig.fetch(&[&cache.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Failed);
    assert!(told.lines().contains("compression 'lrzip' is not supported"), "{}", told.lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_contents_name_may_come_from_another_store_directory() {
    let (cache, rig) = (Cache::of(StoreDir::new("/fnord/store").unwrap()), Rig::new());
    let mut there = cache.by_contents("file", b"by its contents");
    cache.publish(&mut there);
    let here = Cache::new().by_contents("file", b"by its contents");
    assert_ne!(there.path(), here.path());
    let url = format!("{}?store=/fnord/store", cache.url());
    // By its path alone nobody can know.
    assert_eq!(rig.fetch(&[&url], &[], &here).await.0, Outcome::Unavailable);
    let wanted = Wanted { path: here.path().clone(), ca: here.narinfo.info.ca.clone(), explicit: false };
    let (client, told) = rig.client(&[&url], &[]);
    assert_eq!(rig.substituters.substitute(&client, wanted.clone()).await, Outcome::Substituted, "{}", told.lines());
    assert!(rig.has(&here));
    // A cache that does not say that it is for another one is not used.
    let rig = Rig::new();
    let (client, told) = rig.client(&[&cache.url()], &[]);
    assert_eq!(rig.substituters.substitute(&client, wanted).await, Outcome::Unavailable);
    assert!(told.lines().contains("is for Nix stores with prefix '/fnord/store', not '/nix/store'"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_priority_is_asked_first() {
    let rig = Rig::new();
    let caches: Vec<Cache> = (0..3).map(|_| Cache::new()).collect();
    let entries: Vec<_> = caches.iter().map(|cache| cache.add("same", b"same", &[])).collect();
    caches[0].say("Priority: 40\n");
    caches[1].say("Priority: 20\n");
    let third = format!("{}?priority=10", caches[2].url());
    for (sources, first) in [(vec![caches[0].url(), caches[1].url()], 1), (caches.iter().map(Cache::url).collect(), 1)]
    {
        // The one that is asked first has what the others have not.
        let own = caches[first].add("own", b"own", &[]);
        for other in (0..3).filter(|n| *n != first) {
            caches[other].add("own", b"other", &[]);
        }
        let rig = Rig::new();
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        assert_eq!(rig.fetch(&sources, &[], &own).await.0, Outcome::Substituted);
        assert!(rig.has(&own));
    }
    let own = caches[2].add("own", b"third", &[]);
    assert_eq!(rig.fetch(&[&caches[1].url(), &third], &[], &own).await.0, Outcome::Substituted);
    assert!(rig.has(&own) && !rig.has(&entries[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_are_answered_without_fetching() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let inner = cache.add("inner", b"inner", &[]);
    let outer = cache.add("outer", b"outer", &[&inner]);
    let (client, _) = rig.client(&[&cache.url()], &[]);
    let info = rig.substituters.info(&client, outer.path().clone().into()).await.unwrap();
    assert_eq!((info.references.len(), info.nar_size), (1, outer.narinfo.info.nar_size));
    assert_eq!(Some(info.download_size), outer.narinfo.file_size);
    assert!(!rig.has(&outer));
    // Sources that do not want to be asked for many are not.
    assert!(rig.substituters.mass_info(&client, outer.path().clone().into()).await.is_some());
    let (client, _) = rig.client(&[&format!("{}?want-mass-query=false", cache.url())], &[]);
    assert!(rig.substituters.mass_info(&client, outer.path().clone().into()).await.is_none());
    // Nor anybody by who does not want to substitute.
    let (client, _) = rig.client(&[&cache.url()], &[("substitute", "false")]);
    assert!(rig.substituters.info(&client, outer.path().clone().into()).await.is_none());
    assert_eq!(rig.get(&client, outer.path()).await, Outcome::Unavailable);
}
