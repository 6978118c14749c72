//! What a builder is told: environment, arguments, and the files that wait for it in its build directory.

use std::collections::BTreeMap;

use nix_compat::derivation::{BasicDerivation, OutputName, output_placeholder, replace_all};
use nix_compat::hash::sha256;
use nix_compat::nixbase32;
use nix_compat::store_path::{StoreDir, StorePath};
use serde_json::{Map, Value};

use crate::attributes::{self, Attributes};
use crate::graphs::Exported;

/// Everything the builder gets but the filesystem.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    pub(crate) variables: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) args: Vec<Vec<u8>>,
    /// Files to be put into the build directory, by name.
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

/// What the environment depends on beside the derivation.
pub(crate) struct Surroundings<'a> {
    pub(crate) store_dir: &'a StoreDir,
    /// The build directory, as the builder sees it.
    pub(crate) build_dir: &'a str,
    /// Cores the builder should use.
    pub(crate) cores: u64,
    /// Paths of all outputs.
    pub(crate) outputs: &'a BTreeMap<OutputName, StorePath>,
    /// The closures the builder is told.
    pub(crate) exported: &'a Exported,
    /// A variable of the daemon's own environment, for fixed-output derivations that ask for it.
    pub(crate) daemon_variable: &'a dyn Fn(&str) -> Option<Vec<u8>>,
}

impl Environment {
    /// The environment that stock Nix gives.
    pub(crate) fn new(drv: &BasicDerivation, attributes: &Attributes<'_>, around: &Surroundings<'_>) -> Self {
        let placeholders: Vec<(Vec<u8>, Vec<u8>)> = around
            .outputs
            .iter()
            .map(|(name, path)| (output_placeholder(name).into_bytes(), around.store_dir.display(path).into_bytes()))
            .collect();
        let rewrite = |text: &[u8]| replace_all(text, &placeholders);
        let mut environment = Self { args: drv.args.iter().map(|arg| rewrite(arg)).collect(), ..Self::default() };

        // These a derivation may override ...
        environment.set("PATH", "/path-not-set");
        environment.set("HOME", "/homeless-shelter");
        environment.set("NIX_STORE", around.store_dir.as_str());
        environment.set("NIX_BUILD_CORES", around.cores.to_string());
        match attributes.structured() {
            Some(json) => environment.add_structured(json, around, &rewrite),
            None => {
                environment.add_variables(drv, attributes, around, &rewrite);
                environment.files.extend(around.exported.files.iter().cloned());
            }
        }
        // ... and these not.
        for name in ["NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"] {
            environment.set(name, around.build_dir);
        }
        if drv.fixed_output().is_some() {
            environment.set("NIX_OUTPUT_CHECKED", "1");
        }
        if drv.has_network() {
            for name in attributes.words("impureEnvVars").unwrap_or_default() {
                let value = (around.daemon_variable)(&name).unwrap_or_default();
                environment.set(name, value);
            }
        }
        environment.set("NIX_LOG_FD", "2");
        environment.set("TERM", "xterm-256color");
        environment
    }

    /// Tells the builder where it finds a store to use.
    pub(crate) fn set_remote(&mut self, uri: &str) {
        self.set("NIX_REMOTE", uri);
    }

    fn set(&mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.variables.insert(name.into(), value.into());
    }

    fn add_variables(
        &mut self,
        drv: &BasicDerivation,
        attributes: &Attributes<'_>,
        around: &Surroundings<'_>,
        rewrite: &dyn Fn(&[u8]) -> Vec<u8>,
    ) {
        let as_file = attributes.words("passAsFile").unwrap_or_default();
        for (name, value) in &drv.env {
            let value = rewrite(value);
            if as_file.iter().any(|wanted| wanted.as_bytes() == name) {
                let file = format!(".attr-{}", nixbase32::encode(&sha256(name)));
                self.set([name, &b"Path"[..]].concat(), format!("{}/{file}", around.build_dir));
                self.files.push((file, value));
            } else {
                self.set(name.clone(), value);
            }
        }
    }

    fn add_structured(
        &mut self,
        json: &Map<String, Value>,
        around: &Surroundings<'_>,
        rewrite: &dyn Fn(&[u8]) -> Vec<u8>,
    ) {
        let mut json = json.clone();
        let outputs = around
            .outputs
            .iter()
            .map(|(name, path)| (name.to_string(), Value::String(around.store_dir.display(path))))
            .collect();
        json.insert("outputs".into(), Value::Object(outputs));
        json.extend(around.exported.attributes.clone());
        let shell = attributes::to_shell(&json);
        let files = [
            ("NIX_ATTRS_SH_FILE", ".attrs.sh", shell),
            ("NIX_ATTRS_JSON_FILE", ".attrs.json", Value::Object(json).to_string()),
        ];
        for (variable, file, text) in files {
            self.set(variable, format!("{}/{file}", around.build_dir));
            self.files.push((file.to_owned(), rewrite(text.as_bytes())));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix_compat::derivation::Output;

    use super::*;

    const OUT: &str = "/nix/store/35c2i87z0085hipfazin2fhhkkwc9gjx-pass";

    fn environment(env: &[(&str, &str)]) -> Environment {
        let dir = StoreDir::default();
        let out = dir.parse(OUT).unwrap();
        let drv = BasicDerivation {
            name: "pass".into(),
            outputs: BTreeMap::from([(OutputName::default(), Output::InputAddressed(out.clone()))]),
            input_srcs: BTreeSet::new(),
            platform: b"x86_64-linux".to_vec(),
            builder: b"/bin/sh".to_vec(),
            args: vec![b"-c".to_vec(), output_placeholder(&OutputName::default()).into_bytes()],
            env: env.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec())).collect(),
        };
        let attributes = Attributes::new(&drv).unwrap();
        let around = Surroundings {
            store_dir: &dir,
            build_dir: "/build",
            cores: 2,
            outputs: &BTreeMap::from([(OutputName::default(), out)]),
            exported: &Exported::default(),
            daemon_variable: &|_| None,
        };
        Environment::new(&drv, &attributes, &around)
    }

    fn text(environment: &Environment) -> String {
        let line =
            |(k, v): (&Vec<u8>, &Vec<u8>)| format!("{}={}\n", String::from_utf8_lossy(k), String::from_utf8_lossy(v));
        environment.variables.iter().map(line).collect()
    }

    #[test]
    fn the_same_as_stock() {
        // `export` in a builder of Nix 2.34.8.
        let expected = format!(
            "HOME=/homeless-shelter\nNIX_BUILD_CORES=2\nNIX_BUILD_TOP=/build\nNIX_LOG_FD=2\nNIX_STORE=/nix/store\n\
             PATH=/path-not-set\nPWD=/build\nTEMP=/build\nTEMPDIR=/build\nTERM=xterm-256color\nTMP=/build\n\
             TMPDIR=/build\nbuilder=/bin/sh\n\
             fooPath=/build/.attr-1bp7cri8hplaz6hbz0v4f0nl44rl84q1sg25kgwqzipzd1mv89ic\nname=pass\nout={OUT}\n\
             passAsFile=foo\nsystem=x86_64-linux\n"
        );
        let environment = environment(&[
            ("builder", "/bin/sh"),
            ("foo", "bar"),
            ("name", "pass"),
            ("out", OUT),
            ("passAsFile", "foo"),
            ("system", "x86_64-linux"),
        ]);
        assert_eq!(text(&environment), expected);
        assert_eq!(environment.files.len(), 1);
        assert_eq!(environment.files[0].1, b"bar");
        assert_eq!(environment.args, [b"-c".to_vec(), OUT.as_bytes().to_vec()]);
    }

    #[test]
    fn structured_attributes_come_as_files() {
        let environment = environment(&[("__json", r#"{"b":[1,"x"],"a":"it's","name":"pass"}"#), ("hidden", "1")]);
        let names: Vec<&str> = environment.files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [".attrs.sh", ".attrs.json"]);
        let shell = String::from_utf8(environment.files[0].1.clone()).unwrap();
        assert_eq!(
            shell,
            format!(
                "declare a='it'\\''s'\ndeclare -a b=(1 'x' )\ndeclare name='pass'\n\
                 declare -A outputs=(['out']='{OUT}' )\n"
            )
        );
        assert!(!text(&environment).contains("hidden"));
        assert!(text(&environment).contains("NIX_ATTRS_JSON_FILE=/build/.attrs.json\n"));
    }
}
