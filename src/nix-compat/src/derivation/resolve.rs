//! Resolution: putting the paths of inputs in, once they are known.
//!
//! A derivation with content-addressed inputs has placeholders for their paths. When these are built, they take the
//! place of the placeholders, and the derivation becomes one that names store paths alone. Two that resolve to the same
//! are built once: that is how a change without effect stops spreading (*early cut-off*).

use super::{BasicDerivation, Derivation, Error, InputOutputs, Output, OutputName, Placeholder};
use crate::store_path::{StoreDir, StorePath};

impl Derivation {
    /// Whether it names outputs whose paths only their builds tell, or is one for which that makes no difference but
    /// whose outputs are shared by all that resolve to the same.
    ///
    /// `is_known` says of an input derivation's output whether its path follows from the derivation.
    pub fn needs_resolving(&self, is_known: &mut dyn FnMut(&StorePath, &OutputName) -> bool) -> bool {
        if self.input_drvs.is_empty() {
            return false;
        }
        let follows = |output: &Output| matches!(output, Output::InputAddressed(_) | Output::Fixed { .. });
        !self.basic.outputs.values().all(follows)
            || self.is_dynamic()
            || self.input_drvs.iter().any(|(drv, wanted)| !wanted.outputs.iter().all(|output| is_known(drv, output)))
    }

    /// The derivation that is built in the place of this one. `output` gives the path of an output of a derivation in the
    /// store.
    ///
    /// # Errors
    /// [`Error::UnresolvedInput`] for what `output` does not know, and [`Error::NotADerivation`] where an output of an
    /// output is wanted and the latter is none.
    pub fn resolve(
        &self,
        dir: &StoreDir,
        output: &mut dyn FnMut(&StorePath, &OutputName) -> Option<StorePath>,
    ) -> Result<BasicDerivation, Error> {
        let mut basic = self.basic.clone();
        let mut replacements = Vec::new();
        // What is wanted of which derivation, by what placeholder it is known if it has none in the store.
        let mut todo: Vec<(StorePath, Option<Placeholder>, &InputOutputs)> =
            self.input_drvs.iter().map(|(drv, wanted)| (drv.clone(), None, wanted)).collect();
        while let Some((drv, known_by, wanted)) = todo.pop() {
            if !drv.is_derivation() {
                return Err(Error::NotADerivation(drv));
            }
            let mut find = |name: &OutputName| {
                let unresolved = || Error::UnresolvedInput { input: drv.clone(), output: name.clone() };
                let path = output(&drv, name).ok_or_else(unresolved)?;
                let placeholder = match &known_by {
                    None => Placeholder::of_output(&drv, name),
                    Some(outer) => outer.of_dynamic_output(name),
                };
                Ok::<_, Error>((path, placeholder))
            };
            for name in &wanted.outputs {
                let (path, placeholder) = find(name)?;
                replacements.push((placeholder.render().into_bytes(), dir.display(&path).into_bytes()));
                basic.input_srcs.insert(path);
            }
            for (name, wanted) in &wanted.dynamic {
                let (path, placeholder) = find(name)?;
                todo.push((path, Some(placeholder), wanted));
            }
        }
        basic.rewrite(&replacements);
        let deferred = basic.outputs.values().any(|output| matches!(output, Output::Deferred));
        let mut resolved = Derivation::from(basic);
        if deferred {
            // Nothing is unknown any more, so the paths follow as they do without content-addressed inputs.
            resolved.fill_outputs(dir, &mut |_| None)?;
        }
        Ok(resolved.basic)
    }
}

impl BasicDerivation {
    /// Replaces texts in everything that the builder is told.
    fn rewrite(&mut self, replacements: &[(Vec<u8>, Vec<u8>)]) {
        let new = |text: &Vec<u8>| replace_all(text, replacements);
        self.builder = new(&self.builder);
        self.args = self.args.iter().map(new).collect();
        self.env = self.env.iter().map(|(name, value)| (new(name), new(value))).collect();
    }
}

/// Replaces every occurrence of each first by its second.
pub fn replace_all(text: &[u8], replacements: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut text = text.to_vec();
    for (from, to) in replacements {
        let mut start = 0;
        while let Some(at) = text[start..].windows(from.len().max(1)).position(|window| window == from) {
            let at = start + at;
            text.splice(at..at + from.len(), to.iter().copied());
            start = at + to.len();
        }
    }
    text
}
