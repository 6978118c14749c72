#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nix_compat_fuzz::serve(input));
