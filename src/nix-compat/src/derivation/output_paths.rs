//! Output paths: computing them, and checking those a derivation states.

use super::{Derivation, Error, HashModulo, Output, OutputName};
use crate::store_path::{StoreDir, StorePath, fixed_output_path, output_path};

impl Derivation {
    /// Computes the paths of all outputs that can be known before building, and puts them into the outputs and the
    /// environment variables named like them. `input` is as in [`hash_modulo`](Self::hash_modulo).
    ///
    /// What is not content-addressed may be [`Output::Deferred`] before, and is so afterwards if the path of an input
    /// cannot be known before building; its variable is then empty.
    pub fn fill_outputs(
        &mut self,
        dir: &StoreDir,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<(), Error> {
        for (name, output) in &self.basic.outputs {
            if !matches!(output, Output::Floating { .. } | Output::Impure { .. }) {
                // The hash is over the variables' names, too; their values do not count.
                self.basic.env.entry(name.as_str().into()).or_default();
            }
        }
        let hash = self.output_hash_modulo(dir, input)?;
        let basic = &mut self.basic;
        for (name, output) in &mut basic.outputs {
            let path = match output {
                Output::Floating { .. } | Output::Impure { .. } => continue,
                Output::Fixed { path, ca } => {
                    *path = fixed_output_path(dir, &name.path_name(&basic.name), ca.method, &ca.hash)?;
                    path.clone()
                }
                Output::InputAddressed(_) | Output::Deferred => match &hash {
                    HashModulo::Regular(hash) => {
                        let path = output_path(dir, hash, name, &basic.name)?;
                        *output = Output::InputAddressed(path.clone());
                        path
                    }
                    HashModulo::Fixed(_) | HashModulo::Deferred(_) => {
                        *output = Output::Deferred;
                        basic.env.insert(name.as_str().into(), Vec::new());
                        continue;
                    }
                },
            };
            basic.env.insert(name.as_str().into(), dir.display(&path).into_bytes());
        }
        Ok(())
    }

    /// Checks that this can be the derivation at `drv_path`: that its outputs have the paths that follow from it, and
    /// that the environment variables named like them hold these. `input` is as in [`hash_modulo`](Self::hash_modulo).
    ///
    /// Whoever registers a `.drv` has to call this: the paths it states are where builds will put their outputs.
    pub fn verify_outputs(
        &self,
        dir: &StoreDir,
        drv_path: &StorePath,
        input: &mut dyn FnMut(&StorePath) -> Option<HashModulo>,
    ) -> Result<(), Error> {
        if drv_path.name().strip_suffix(".drv") != Some(&self.basic.name) {
            return Err(Error::NotADerivation(drv_path.clone()));
        }
        let hash = self.output_hash_modulo(dir, input)?;
        for (name, output) in &self.basic.outputs {
            let (found, computed) = match output {
                Output::Floating { .. } | Output::Impure { .. } | Output::Deferred => continue,
                Output::Fixed { path, ca } => {
                    (path, fixed_output_path(dir, &name.path_name(&self.basic.name), ca.method, &ca.hash)?)
                }
                Output::InputAddressed(path) => match &hash {
                    HashModulo::Regular(hash) => (path, output_path(dir, hash, name, &self.basic.name)?),
                    HashModulo::Fixed(_) | HashModulo::Deferred(_) => {
                        let (drv, output) = (self.basic.name.clone(), name.clone());
                        return Err(Error::PathNotKnown { name: drv, output });
                    }
                },
            };
            if *found != computed {
                let (drv, output, found) = (self.basic.name.clone(), name.clone(), found.clone());
                return Err(Error::WrongOutputPath { name: drv, output, found, computed });
            }
            self.verify_variable(dir, name, found)?;
        }
        Ok(())
    }

    fn verify_variable(&self, dir: &StoreDir, output: &OutputName, path: &StorePath) -> Result<(), Error> {
        let (name, output, path) = (self.basic.name.clone(), output.clone(), path.clone());
        let Some(value) = self.basic.env.get(output.as_str().as_bytes()) else {
            return Err(Error::MissingOutputVariable { name, output, path });
        };
        match std::str::from_utf8(value).ok().and_then(|value| dir.parse(value).ok()) {
            Some(found) if found == path => Ok(()),
            _ => Err(Error::WrongOutputVariable { name, output, path }),
        }
    }
}
