//! Narinfos, against those that `nix copy --to file://…` of Nix 2.34.8 wrote into a binary cache.

use nix_compat::hash::{Algorithm, Hash};
use nix_compat::narinfo::{Compression, Error, NarInfo};
use nix_compat::path_info::PathInfo;
use nix_compat::signature::{PublicKey, Signature};
use nix_compat::store_path::StoreDir;
use proptest::prelude::*;

/// The key the cache was written with (`?secret-key=`).
const PUBLIC: &str = "test-1:2n/H6yVL4UgfW/iPS6i8uGNbgfoJ7xhaETuVnUQZczw=";

/// Of a build's output that refers to itself and another path.
const BUILT: &str = "\
StorePath: /tmp/ni/store/a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top
URL: nar/169i6jzmx8ank6vig3jiy7x5vzszs9n22lmgwbahlvcwz5yj2ns9.nar.zst
Compression: zstd
FileHash: sha256:169i6jzmx8ank6vig3jiy7x5vzszs9n22lmgwbahlvcwz5yj2ns9
FileSize: 167
NarHash: sha256:11pb988wjn10hcwkadgnp6ldvw63aa20cc2xjjxxspp03fniyjay
NarSize: 216
References: a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top q2k4jasqv61b6hbxyl3di2iwhiw72igk-dep
Deriver: imc7rmfkfv5xa0kfakp5a43csqi1yysp-top.drv
Sig: test-1:I6BqMIdonygoDGZ7ZVeKlSlSJW0EnolQTTsxAbZDBNgaA8k98i8O5iEJR6JDemcNNmJHFhgauK9//atQBJvcBw==
";

/// Of a file that was added: content-addressed, without references or deriver.
const ADDED: &str = "\
StorePath: /tmp/ni/store/k60iml9gc6jsq8ggig38ydpyrp32zvnz-f
URL: nar/1xpfn1wbb9pvkj0pci1j43263x670m3awb1hmdn8cg82k5i25aws.nar.zst
Compression: zstd
FileHash: sha256:1xpfn1wbb9pvkj0pci1j43263x670m3awb1hmdn8cg82k5i25aws
FileSize: 92
NarHash: sha256:1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h
NarSize: 120
References: \nSig: test-1:vgiA2ATbHtZrY1WYdLg2iTbDHfmaQ4Vv0hNPZgHPBG/bkDmLvZdEK0FeFOjcNjYFftXtBBidJQhkFFejVmw4Ag==
CA: fixed:r:sha256:1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h
";

fn dir() -> StoreDir {
    StoreDir::new("/tmp/ni/store").unwrap()
}

fn parse(text: &str) -> Result<NarInfo, Error> {
    NarInfo::parse(&dir(), text)
}

/// [`BUILT`] with the line of a field replaced, or left out.
fn with(field: &str, line: &str) -> String {
    let replaced =
        |old: &str| if old.starts_with(&format!("{field}: ")) { line.to_owned() } else { old.to_owned() + "\n" };
    let text: String = BUILT.lines().map(replaced).collect();
    assert_ne!(text, BUILT);
    text
}

#[test]
fn reads_and_writes_what_stock_nix_writes() {
    let built = parse(BUILT).unwrap();
    assert_eq!(built.to_text(&dir()), BUILT);
    assert_eq!(built.url(), "nar/169i6jzmx8ank6vig3jiy7x5vzszs9n22lmgwbahlvcwz5yj2ns9.nar.zst");
    assert_eq!((built.compression, built.file_size), (Compression::Zstd, Some(167)));
    let hash = built.file_hash.unwrap();
    assert_eq!((hash.algorithm(), built.url()), (Algorithm::Sha256, &*format!("nar/{}.nar.zst", hash.to_nix32())));
    // as `nix path-info --json` says of the same path
    let expected = PathInfo {
        path: "a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top".parse().unwrap(),
        deriver: Some("imc7rmfkfv5xa0kfakp5a43csqi1yysp-top.drv".parse().unwrap()),
        nar_hash: nix_compat::hash::NarHash::parse("sha256-XkkfrRvgXt27lF0wBoRSw/DdqLn2NTU5gyBYyRFK64Y=").unwrap(),
        nar_size: 216,
        references: ["a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top", "q2k4jasqv61b6hbxyl3di2iwhiw72igk-dep"]
            .map(|path| path.parse().unwrap())
            .into(),
        registration_time: 0,
        signatures: built.info.signatures.clone(),
        ultimate: false,
        ca: None,
    };
    assert_eq!(built.info, expected);

    let added = parse(ADDED).unwrap();
    assert_eq!(added.to_text(&dir()), ADDED);
    assert!(added.info.references.is_empty() && added.info.deriver.is_none());
    assert!(added.info.is_content_addressed(&dir()));
}

#[test]
fn the_signatures_of_stock_nix_cover_the_fingerprint() {
    let key = [PublicKey::parse(PUBLIC).unwrap()];
    let built = parse(BUILT).unwrap();
    assert_eq!(
        built.info.fingerprint(&dir()),
        "1;/tmp/ni/store/a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top;\
         sha256:11pb988wjn10hcwkadgnp6ldvw63aa20cc2xjjxxspp03fniyjay;216;\
         /tmp/ni/store/a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top,/tmp/ni/store/q2k4jasqv61b6hbxyl3di2iwhiw72igk-dep"
    );
    assert!(built.info.is_signed_by(&dir(), &key));
    assert!(parse(ADDED).unwrap().info.is_signed_by(&dir(), &key));
    for changed in [BUILT.replace("NarSize: 216", "NarSize: 217"), BUILT.replace("igk-dep", "igk-dop")] {
        assert!(!parse(&changed).unwrap().info.is_signed_by(&dir(), &key));
    }
}

/// Each of these was tried on stock Nix, by `nix path-info --store file://…`.
#[test]
fn what_stock_nix_accepts() {
    let same = [
        format!("{BUILT}System: x86_64-linux\n"),
        format!("{BUILT}CA: \n"),
        with("NarHash", "NarHash: sha256-XkkfrRvgXt27lF0wBoRSw/DdqLn2NTU5gyBYyRFK64Y=\n"),
        format!("{BUILT}{}\n", BUILT.lines().last().unwrap()),
        BUILT.replace("-top q2k4", "-top  q2k4"),
        BUILT.split_inclusive('\n').rev().collect(),
    ];
    for text in same {
        assert_eq!(parse(&text), parse(BUILT), "{text}");
    }
    assert_eq!(parse(&with("Deriver", "Deriver: unknown-deriver\n")).unwrap().info.deriver, None);
    assert!(parse(&with("Deriver", "Deriver: imc7rmfkfv5xa0kfakp5a43csqi1yysp-top\n")).unwrap().info.deriver.is_some());
    for references in ["", "References: \n"] {
        assert!(parse(&with("References", references)).unwrap().info.references.is_empty());
    }
    for compression in ["", "Compression: \n"] {
        assert_eq!(parse(&with("Compression", compression)).unwrap().compression, Compression::Bzip2);
    }
    assert_eq!(parse(&with("FileHash", "")).unwrap().file_hash, None);
    assert_eq!(parse(&with("FileSize", "")).unwrap().file_size, None);
    let sha1 = parse(&with("FileHash", "FileHash: sha1:kpcd173cq987hw957sx6m0868wv3x6d9\n")).unwrap();
    assert_eq!(sha1.file_hash.map(|hash| hash.algorithm()), Some(Algorithm::Sha1));
}

/// Each of these was refused by stock Nix as well.
#[test]
fn what_is_refused() {
    assert_eq!(parse(""), Err(Error::Missing("StorePath")));
    assert_eq!(parse(&BUILT[..BUILT.len() - 1]), Err(Error::Truncated));
    assert_eq!(parse(&format!("{BUILT}\n")), Err(Error::Line(String::new())));
    assert_eq!(parse(&format!("{BUILT}foo\n")), Err(Error::Line("foo".into())));
    assert_eq!(parse(&format!("{BUILT}References: \n")), Err(Error::Repeated("References")));
    assert_eq!(parse(&with("NarSize", "NarSize: 0\n")), Err(Error::EmptyNar));
    assert_eq!(parse(&with("NarSize", "NarSize: 1k\n")), Err(Error::Number { field: "NarSize", value: "1k".into() }));
    assert!(matches!(parse(&with("NarSize", "NarSize: 18446744073709551616\n")), Err(Error::Number { .. })));
    assert_eq!(parse(&with("URL", "URL: \n")), Err(Error::Url(String::new())));
    for (field, line) in
        [("NarHash", "NarHash: 11pb988wjn10hcwkadgnp6ldvw63aa20cc2xjjxxspp03fniyjay\n"), ("FileHash", "FileHash: \n")]
    {
        assert!(matches!(parse(&with(field, line)), Err(Error::Hash(_))), "{line}");
    }
    for (field, line) in [
        ("Deriver", "Deriver: \n"),
        ("References", "References: /tmp/ni/store/q2k4jasqv61b6hbxyl3di2iwhiw72igk-dep\n"),
        ("StorePath", "StorePath: a3hmhiqn6y0gdhz0y5z2lk40vlnpyfgp-top\n"),
    ] {
        assert!(matches!(parse(&with(field, line)), Err(Error::Path(_))), "{line}");
    }
    assert!(matches!(parse(&BUILT.replace('\n', "\r\n")), Err(Error::Path(_))));
    for line in ["Sig: x\n", "Sig: \n"] {
        assert!(matches!(parse(&with("Sig", line)), Err(Error::Signature(_))), "{line}");
    }
    let git = format!("{BUILT}CA: fixed:git:sha1:kpcd173cq987hw957sx6m0868wv3x6d9\n");
    assert!(parse(&git).is_ok());
    let other = format!("{BUILT}CA: fixed:hg:sha1:kpcd173cq987hw957sx6m0868wv3x6d9\n");
    assert!(matches!(parse(&other), Err(Error::ContentAddress(_))));
    for field in ["StorePath", "URL", "NarHash", "NarSize"] {
        assert_eq!(parse(&with(field, "")), Err(Error::Missing(field)));
    }
}

/// Stock takes the last of several, any hash, and whatever name of a compression: nothing good can come of it.
#[test]
fn what_is_refused_although_stock_nix_accepts_it() {
    for line in BUILT.lines().filter(|line| !line.starts_with("Sig: ")) {
        assert!(matches!(parse(&format!("{BUILT}{line}\n")), Err(Error::Repeated(_))), "{line}");
    }
    assert_eq!(parse(&format!("{BUILT}CA: \nCA: \n")), Err(Error::Repeated("CA")));
    assert!(matches!(parse(&with("NarHash", "NarHash: md5:3jgzhjhz9zjvbb0kyj7jc500ch\n")), Err(Error::Hash(_))));
    assert_eq!(parse(&with("Compression", "Compression: foo\n")), Err(Error::Compression("foo".into())));
    assert!(matches!(parse(&with("NarSize", "NarSize: +216\n")), Err(Error::Number { .. })));
}

#[test]
fn nothing_can_be_smuggled_into_a_line() {
    let narinfo = parse(ADDED).unwrap();
    for url in ["", "x\nSig: y", "x\n"] {
        assert_eq!(NarInfo::new(narinfo.info.clone(), url, Compression::None), Err(Error::Url(url.into())));
    }
    let mut smuggling = narinfo.clone();
    smuggling.info.signatures.insert(Signature::from_parts("x\nDeriver", b"y").unwrap());
    assert_eq!(smuggling.to_text(&dir()), ADDED);
}

proptest! {
    #[test]
    fn reads_what_it_writes(
        url in "[^\n]{1,40}",
        compression in prop::sample::select(Compression::ALL),
        data: Vec<u8>,
        file: Option<(u64, bool)>,
        nar_size in 1u64..,
        names in prop::collection::btree_set("[a-z]{1,9}", 0..4),
        ca: bool,
    ) {
        let mut info = parse(if ca { ADDED } else { BUILT }).unwrap().info;
        info.nar_size = nar_size;
        info.references = names.iter().map(|name| format!("{}-{name}", info.path.hash_part()).parse().unwrap()).collect();
        let mut narinfo = NarInfo::new(info, url, compression).unwrap();
        if let Some((size, sha512)) = file {
            narinfo.file_size = Some(size);
            narinfo.file_hash = Some(Hash::of(if sha512 { Algorithm::Sha512 } else { Algorithm::Sha256 }, &data));
        }
        prop_assert_eq!(parse(&narinfo.to_text(&dir())), Ok(narinfo));
    }

    #[test]
    fn damage_is_an_error_or_another_narinfo(at: prop::sample::Index, byte in 0u8..128) {
        let mut bytes = BUILT.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let text = String::from_utf8(bytes).unwrap();
        if let Ok(narinfo) = parse(&text) {
            prop_assert_eq!(parse(&narinfo.to_text(&dir())), Ok(narinfo));
        }
    }
}
