//! Placeholders: what stands in a derivation for a path that is not known yet.

use super::OutputName;
use crate::hash::sha256;
use crate::nixbase32;
use crate::store_path::StorePath;

/// Stands for an output of the derivation itself; the builder is given the path in its place.
pub fn output_placeholder(output: &OutputName) -> String {
    placeholder(&format!("nix-output:{output}"))
}

/// Stands for a content-addressed output of an input derivation.
pub fn upstream_placeholder(drv_path: &StorePath, output: &OutputName) -> String {
    Placeholder::of_output(drv_path, output).render()
}

/// What stands for an output of an input derivation, possibly one that has yet to be built itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placeholder([u8; 32]);

/// Bytes of a placeholder that go into one made from it: as many as a store path's hash part has.
const FOLDED: usize = 20;

impl Placeholder {
    /// An output of a derivation in the store.
    pub fn of_output(drv_path: &StorePath, output: &OutputName) -> Self {
        let drv_name = drv_path.name().strip_suffix(".drv").unwrap_or(drv_path.name());
        let name = output.path_name(drv_name);
        Self(sha256(format!("nix-upstream-output:{}:{name}", drv_path.hash_part()).as_bytes()))
    }

    /// An output of the derivation that this one stands for.
    pub fn of_dynamic_output(&self, output: &OutputName) -> Self {
        let mut folded = [0; FOLDED];
        for (i, byte) in self.0.iter().enumerate() {
            folded[i % FOLDED] ^= byte;
        }
        let folded = nixbase32::encode(&folded);
        Self(sha256(format!("nix-computed-output:{folded}:{output}").as_bytes()))
    }

    /// The text that stands in the derivation.
    pub fn render(&self) -> String {
        format!("/{}", nixbase32::encode(&self.0))
    }
}

fn placeholder(clear_text: &str) -> String {
    Placeholder(sha256(clear_text.as_bytes())).render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_of_stock_nix() {
        // `nix-instantiate --eval -E 'builtins.placeholder "out"'`
        assert_eq!(output_placeholder(&OutputName::default()), "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9");
    }

    #[test]
    fn placeholders_for_inputs() {
        // As upstream's unit tests of downstream placeholders have them.
        let out = OutputName::default();
        let drv = |name: &str| StorePath::from_base_name(&format!("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-{name}")).unwrap();
        let known = upstream_placeholder(&drv("foo.drv"), &out);
        assert_eq!(known, "/0c6rn30q4frawknapgwq386zq358m8r6msvywcvc89n6m5p2dgbz");
        let computed = Placeholder::of_output(&drv("foo.drv.drv"), &out).of_dynamic_output(&out);
        assert_eq!(computed.render(), "/0gn6agqxjyyalf0dpihgyf49xq5hqxgw100f0wydnj6yqrhqsb3w");
    }
}
