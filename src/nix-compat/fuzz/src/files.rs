//! Formats of whole files: derivations, narinfos, nix.conf, lists of machines.

use nix_compat::conf::{self, Settings};
use nix_compat::derivation::{Derivation, HashModulo};
use nix_compat::machines;
use nix_compat::narinfo::{Error, NarInfo};
use nix_compat::store_path::{StoreDir, text_path};
use nix_compat::store_uri::StoreUri;

/// A `.drv` file of the name `x`.
pub fn derivation(input: &[u8]) {
    let (dir, name) = (StoreDir::default(), "x");
    let mut derivation = match Derivation::parse(&dir, name, input) {
        Ok(derivation) => derivation,
        Err(error) => {
            let _ = error.to_string();
            return;
        }
    };
    let text = derivation.to_aterm(&dir);
    assert_eq!(Derivation::parse(&dir, name, &text).unwrap(), derivation);
    // No derivation ends before its last byte.
    assert!(Derivation::parse(&dir, name, &input[..input.len() - 1]).is_err());

    let mut inputs = |input: &_| {
        assert!(derivation_refers_to(&text, &dir.display(input)));
        Some(HashModulo::Regular([7; 32]))
    };
    let _ = derivation.hash_modulo(&dir, &mut inputs);
    let own = text_path(&dir, "x.drv", &text, &derivation.references()).unwrap();
    let _ = derivation.verify_outputs(&dir, &own, &mut inputs);
    if derivation.fill_outputs(&dir, &mut inputs).is_ok() {
        let text = derivation.to_aterm(&dir);
        let own = text_path(&dir, "x.drv", &text, &derivation.references()).unwrap();
        derivation.verify_outputs(&dir, &own, &mut |_| Some(HashModulo::Regular([7; 32]))).unwrap();
        let before = derivation.clone();
        derivation.fill_outputs(&dir, &mut |_| Some(HashModulo::Regular([7; 32]))).unwrap();
        assert_eq!(derivation, before, "output paths depend on themselves");
    }
}

fn derivation_refers_to(text: &[u8], path: &str) -> bool {
    text.windows(path.len()).any(|window| window == path.as_bytes())
}

/// A narinfo.
pub fn narinfo(input: &[u8]) {
    let (Ok(text), dir) = (std::str::from_utf8(input), StoreDir::default()) else { return };
    let narinfo = match NarInfo::parse(&dir, text) {
        Ok(narinfo) => narinfo,
        Err(error) => {
            let _ = error.to_string();
            return;
        }
    };
    let printed = narinfo.to_text(&dir);
    assert_eq!(NarInfo::parse(&dir, &printed), Ok(narinfo.clone()));
    assert_eq!(NarInfo::parse(&dir, &printed).unwrap().to_text(&dir), printed);
    assert_eq!(NarInfo::parse(&dir, &text[..text.len() - 1]), Err(Error::Truncated));
    // What is signed is one line and has a place for everything.
    let fingerprint = narinfo.info.fingerprint(&dir);
    assert_eq!((fingerprint.lines().count(), fingerprint.split(';').count()), (1, 5));
    let _ = narinfo.info.is_content_addressed(&dir);
}

/// A `nix.conf`. NUL bytes divide the input into files; each can be included by its number.
pub fn conf(input: &[u8]) {
    let files: Vec<String> = input.split(|byte| *byte == 0).map(|f| String::from_utf8_lossy(f).into_owned()).collect();
    let mut include = |path: &str, _optional: bool| {
        let number = path.rsplit('/').next().and_then(|name| name.parse::<usize>().ok());
        match number {
            Some(number) => Ok(files.get(number).cloned()),
            None => Err("not a number".to_owned()),
        }
    };
    let lines = match conf::parse(&files[0], "/etc/nix/0", &mut include) {
        Ok(lines) => lines,
        Err(error) => {
            let _ = error.to_string();
            return;
        }
    };
    let text: String = lines.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
    let again = conf::parse(&text, "x", &mut |path, _| panic!("{path} is included by a text without inclusions"));
    assert_eq!(again.unwrap(), lines);

    let mut settings = Settings::new(3);
    for (name, value) in &lines {
        let before = settings.clone();
        match settings.set(name, value) {
            Ok(_) if !name.starts_with("extra-") => {
                let once = settings.clone();
                settings.set(name, value).unwrap();
                assert_eq!(settings, once, "setting {name} twice is not the same as once");
            }
            Ok(_) => {}
            Err(error) => {
                let _ = error.to_string();
                assert_eq!(settings, before, "a value of {name} was refused and used");
            }
        }
    }
    let _ = settings.public_keys();
}

/// A list of machines. NUL bytes divide the input into files, as for [`conf`].
pub fn machines(input: &[u8]) {
    let files: Vec<String> = input.split(|byte| *byte == 0).map(|f| String::from_utf8_lossy(f).into_owned()).collect();
    let systems = ["here".to_owned()].into();
    let mut include = |path: &str| match path.parse::<usize>() {
        Ok(number) => Ok(files.get(number).cloned()),
        Err(error) => Err(error.to_string()),
    };
    let machines = match machines::parse(&files[0], &systems, &mut include) {
        Ok(machines) => machines,
        Err(error) => {
            let _ = error.to_string();
            return;
        }
    };
    for machine in machines {
        assert!(machine.speed_factor.is_finite() && machine.speed_factor > 0.0);
        assert_eq!(StoreUri::parse(&machine.store.to_string()), Ok(machine.store.clone()));
        let mandatory = machine.mandatory_features.iter().map(String::as_str);
        assert!(machine.builds("builtin", mandatory));
    }
}
