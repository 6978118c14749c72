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
    let drv_name = drv_path.name().strip_suffix(".drv").unwrap_or(drv_path.name());
    placeholder(&format!("nix-upstream-output:{}:{}", drv_path.hash_part(), output.path_name(drv_name)))
}

fn placeholder(clear_text: &str) -> String {
    format!("/{}", nixbase32::encode(&sha256(clear_text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_of_stock_nix() {
        // `nix-instantiate --eval -E 'builtins.placeholder "out"'`
        assert_eq!(output_placeholder(&OutputName::default()), "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9");
    }
}
