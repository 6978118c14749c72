//! What outputs of content-addressed derivations turned out to be.

use nix_compat::realisation::{DrvOutput, Realisation};
use substitute::{Outcome, Substituter};

use crate::rig::{Cache, Rig, key};

fn id(n: u8) -> DrvOutput {
    DrvOutput::Modulo { hash: [n; 32], output: "out".parse().unwrap() }
}

fn publish(cache: &Cache, realisation: &Realisation) {
    let name = cache.path().join("realisations").join(format!("{}.doi", realisation.id));
    std::fs::write(name, realisation.to_json()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_comes_with_what_it_turned_out_to_be() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let mut inner = cache.by_contents("inner", b"inner");
    cache.publish(&mut inner);
    let mut outer = cache.by_contents("outer", b"outer");
    cache.publish(&mut outer);
    let mut first = Realisation::new(id(1), inner.path().clone());
    first.sign(&key(1));
    publish(&cache, &first);
    let mut second = Realisation::new(id(2), outer.path().clone());
    second.dependencies.insert(id(1), inner.path().clone());
    second.sign(&key(1));
    publish(&cache, &second);

    let (client, told) = rig.client(&[&cache.url()], &[]);
    assert_eq!(rig.substituters.realisation(&client, id(2)).await.unwrap(), second);
    assert_eq!(rig.substituters.realise(&client, id(2)).await, Outcome::Substituted, "{}", told.lines());
    assert!(rig.has(&outer) && rig.has(&inner));
    assert_eq!(rig.store.realisation(&id(2)).unwrap().unwrap(), second);
    assert_eq!(rig.store.realisation(&id(1)).unwrap().unwrap(), first);
    assert_eq!(rig.substituters.realise(&client, id(3)).await, Outcome::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_may_say_without_a_signature() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let mut entry = cache.by_contents("x", b"x");
    cache.publish(&mut entry);
    let mut said = Realisation::new(id(1), entry.path().clone());
    for seed in [None, Some(2)] {
        said.signatures.clear();
        if let Some(seed) = seed {
            said.sign(&key(seed));
        }
        publish(&cache, &said);
        let (client, told) = rig.client(&[&cache.url()], &[]);
        assert_eq!(rig.substituters.realise(&client, id(1)).await, Outcome::Unavailable);
        assert!(told.lines().contains("ignoring realisation of"), "{}", told.lines());
        assert!(rig.store.realisation(&id(1)).unwrap().is_none() && !rig.has(&entry));
    }
    // Nor for another output than the one that was asked for.
    let mut other = Realisation::new(id(2), entry.path().clone());
    other.sign(&key(1));
    std::fs::write(cache.path().join("realisations").join(format!("{}.doi", id(1))), other.to_json()).unwrap();
    let (client, told) = rig.client(&[&cache.url()], &[]);
    assert_eq!(rig.substituters.realise(&client, id(1)).await, Outcome::Unavailable);
    assert!(told.lines().contains("but got"), "{}", told.lines());

    publish(&cache, &said);
    let (client, _) = rig.client(&[&cache.url()], &[("require-sigs", "false")]);
    assert_eq!(rig.substituters.realise(&client, id(1)).await, Outcome::Substituted);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_here_is_not_contradicted() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let mut paths = [b"here", b"else"].map(|contents| cache.by_contents("x", contents));
    paths.iter_mut().for_each(|path| cache.publish(path));
    let (client, told) = rig.client(&[&cache.url()], &[]);
    rig.get(&client, paths[0].path()).await;
    let here = Realisation::new(id(1), paths[0].path().clone());
    rig.store.register_realisation(&here, store::SignaturePolicy::DontCheck).unwrap();
    let mut top = Realisation::new(id(2), paths[1].path().clone());
    top.dependencies.insert(id(1), paths[1].path().clone());
    top.sign(&key(1));
    publish(&cache, &top);
    assert_eq!(rig.substituters.realise(&client, id(2)).await, Outcome::Unavailable);
    assert!(told.lines().contains("has an incompatible realisation for"), "{}", told.lines());
}
