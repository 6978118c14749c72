//! Reading: at offsets, through mappings, by many at once, and from damaged storage.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;

use castore::Node;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, lseek};

use crate::fixture::{counting, mounted, noise};

const LARGE: usize = 5 * 1024 * 1024 + 123;

#[test]
fn any_part_of_a_large_file() {
    let Some(store) = mounted() else { return };
    let contents = noise(LARGE, 1);
    let base = store.view.add("large", store.view.file(&contents));
    let file = File::open(store.path(&base)).unwrap();
    let mut offsets = noise(8 * 200, 2);
    offsets.extend((LARGE as u64 - 1).to_le_bytes());
    for raw in offsets.chunks_exact(8) {
        let offset = (u64::from_le_bytes(raw.try_into().unwrap()) % LARGE as u64) as usize;
        let mut buffer = vec![0; 1 + offset % 70_000];
        let read = file.read_at(&mut buffer, offset as u64).unwrap();
        assert!(read > 0);
        assert!(buffer[..read] == contents[offset..offset + read], "{read} bytes at {offset}");
    }
    assert_eq!(file.read_at(&mut [0; 10], LARGE as u64).unwrap(), 0);
    assert_eq!(file.read_at(&mut [0; 10], LARGE as u64 * 2).unwrap(), 0);
    assert!(fs::read(store.path(&base)).unwrap() == contents);
}

#[test]
fn seeking_from_every_end() {
    let Some(store) = mounted() else { return };
    let base = store.view.add("file", store.view.file("0123456789"));
    let mut file = File::open(store.path(&base)).unwrap();
    let mut tail = String::new();
    assert_eq!(file.seek(SeekFrom::End(-3)).unwrap(), 7);
    file.read_to_string(&mut tail).unwrap();
    assert_eq!(tail, "789");
    assert_eq!(file.seek(SeekFrom::Start(100)).unwrap(), 100);
    assert_eq!(file.read(&mut [0; 4]).unwrap(), 0);
}

#[test]
fn a_file_is_data_from_its_beginning_to_its_end() {
    let Some(store) = mounted() else { return };
    // Zeros that could be a hole elsewhere, and an empty file, which has neither.
    let zeros = store.view.add("zeros", store.view.file(vec![0; 300_000]));
    let empty = store.view.add("empty", store.view.file(""));
    let file = File::open(store.path(&zeros)).unwrap();
    for offset in [0, 1, 4096, 299_999] {
        assert_eq!(lseek(&file, offset, Whence::SeekData), Ok(offset));
        assert_eq!(lseek(&file, offset, Whence::SeekHole), Ok(300_000));
    }
    let empty = File::open(store.path(&empty)).unwrap();
    for (file, offset) in [(&file, 300_000), (&file, 400_000), (&empty, 0)] {
        assert_eq!(lseek(file, offset, Whence::SeekData), Err(Errno::ENXIO), "at {offset}");
        assert_eq!(lseek(file, offset, Whence::SeekHole), Err(Errno::ENXIO), "at {offset}");
    }
    assert_eq!(lseek(&file, -1, Whence::SeekSet), Err(Errno::EINVAL));
}

#[test]
fn files_may_be_larger_than_four_gib() {
    const SIZE: u64 = (5 << 30) + 1234;
    let Some(store) = mounted() else { return };
    let base = store.view.add("huge", store.view.counting_file(SIZE));
    let mut file = File::open(store.path(&base)).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert_eq!(file.metadata().unwrap().blocks(), SIZE.div_ceil(512));
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), SIZE);
    for offset in [0, (2 << 30) - 5000, (4 << 30) - 5000, (4 << 30) + 1, SIZE - 10_000] {
        let mut read = vec![0; 10_000];
        file.read_exact_at(&mut read, offset).unwrap();
        assert!(read == counting(offset, read.len()), "at {offset}");
    }
    assert_eq!(file.read_at(&mut [0; 100], SIZE - 34).unwrap(), 34);
    assert_eq!(file.read_at(&mut [0; 100], SIZE).unwrap(), 0);
    let (len, offset) = (NonZeroUsize::new(65_536).unwrap(), (4u64 << 30) - 32_768);
    // SAFETY: a new mapping, read only while it lasts; the file never changes.
    let mapping =
        unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, offset as libc::off_t) }.unwrap();
    // SAFETY: the mapping is that long and readable.
    let mapped = unsafe { std::slice::from_raw_parts(mapping.as_ptr().cast::<u8>(), len.get()) };
    assert!(mapped == counting(offset, len.get()));
    // SAFETY: `mapped` is not used any more.
    unsafe { munmap(mapping, len.get()) }.unwrap();
}

#[test]
fn a_private_mapping_is_its_writers_alone_and_a_shared_one_for_writing_is_refused() {
    let Some(store) = mounted() else { return };
    let base = store.view.add("mapped", store.view.file(noise(10_000, 5)));
    let file = File::open(store.path(&base)).unwrap();
    let (len, writable) = (NonZeroUsize::new(10_000).unwrap(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    // SAFETY: if this succeeded, nobody would use the mapping.
    let refused = unsafe { mmap(None, len, writable, MapFlags::MAP_SHARED, &file, 0) };
    assert_eq!(refused.unwrap_err(), Errno::EACCES);
    // SAFETY: a new mapping of our own.
    let mapping = unsafe { mmap(None, len, writable, MapFlags::MAP_PRIVATE, &file, 0) }.unwrap();
    // SAFETY: the mapping is whole pages: what is behind the file's end in the last one is zero.
    let mapped = unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().cast::<u8>(), 3 * 4096) };
    assert!(mapped[10_000..].iter().all(|byte| *byte == 0));
    mapped[5000] ^= 1;
    assert!(mapped[5000] != noise(10_000, 5)[5000]);
    assert!(fs::read(store.path(&base)).unwrap() == noise(10_000, 5));
    // SAFETY: `mapped` is not used any more.
    unsafe { munmap(mapping, len.get()) }.unwrap();
}

#[test]
fn scripts_run_and_find_their_interpreter_in_the_store() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let shell = view.add("shell", view.executable(fs::read("/bin/sh").unwrap()));
    let text = format!("#!{}\necho \"$0\" \"$1\"\n", store.path(&shell).display());
    let script = view.add("script", view.executable(text));
    let output = std::process::Command::new(store.path(&script)).arg("told").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, format!("{} told\n", store.path(&script).display()));
}

#[test]
fn mapped_shared_and_private() {
    let Some(store) = mounted() else { return };
    let contents = noise(LARGE, 3);
    let base = store.view.add("mapped", store.view.file(&contents));
    let file = File::open(store.path(&base)).unwrap();
    for flags in [MapFlags::MAP_SHARED, MapFlags::MAP_PRIVATE] {
        let len = NonZeroUsize::new(LARGE).unwrap();
        // SAFETY: a new mapping, read only while it lasts; the file never changes.
        let mapping = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, &file, 0) }.unwrap();
        // SAFETY: the mapping is LARGE bytes long and readable.
        let mapped = unsafe { std::slice::from_raw_parts(mapping.as_ptr().cast::<u8>(), LARGE) };
        assert!(mapped[4_000_000..4_000_100] == contents[4_000_000..4_000_100]);
        assert!(mapped == contents);
        // SAFETY: `mapped` is not used any more.
        unsafe { munmap(mapping, LARGE) }.unwrap();
    }
}

#[test]
fn programs_run_from_it() {
    let Some(store) = mounted() else { return };
    let program = fs::read("/proc/self/exe").unwrap();
    let base = store.view.add("program", store.view.directory([("bin", store.view.executable(program))]));
    let output = std::process::Command::new(store.path(&base).join("bin")).arg("--list").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("programs_run_from_it"));
}

#[test]
fn many_readers_at_once() {
    const READERS: u64 = 8;
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let files: Vec<_> = (0..200).map(|seed| noise(1 + seed * 977, seed as u64)).collect();
    let entries = files.iter().enumerate().map(|(i, contents)| (format!("{i:03}"), view.file(contents)));
    let base = view.add("many", view.directory(entries.collect::<Vec<_>>()));
    thread::scope(|scope| {
        for reader in 0..READERS {
            let (files, dir) = (&files, store.path(&base));
            scope.spawn(move || {
                for step in 0..files.len() {
                    let i = (step * (2 * reader as usize + 1)) % files.len();
                    assert!(fs::read(dir.join(format!("{i:03}"))).unwrap() == files[i], "file {i}, reader {reader}");
                }
            });
        }
    });
}

#[test]
fn damage_is_an_error_for_that_read_alone() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let bad = view.file(noise(10_000, 4));
    let Node::File { digest, .. } = bad else { unreachable!() };
    let base = view.add("mixed", view.directory([("bad", bad), ("good", view.file("good"))]));
    view.damage(digest);
    let error = fs::read(store.path(&base).join("bad")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
    assert_eq!(fs::read(store.path(&base).join("good")).unwrap(), b"good");
    view.repair(digest);
    assert!(fs::read(store.path(&base).join("bad")).unwrap() == noise(10_000, 4));
}

#[test]
fn a_blob_shorter_than_its_node_says_is_an_error_not_zeros() {
    let Some(store) = mounted() else { return };
    let Node::File { digest, .. } = store.view.file("short") else { unreachable!() };
    let base = store.view.add("liar", Node::File { digest, size: 9_000, executable: false });
    let error = fs::read(store.path(&base)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
}
