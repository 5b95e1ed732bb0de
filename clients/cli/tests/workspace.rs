//! The shape of the workspace: which crate may know which, and what stays out of
//! the deterministic ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

/// Every edge between crates of the workspace that may be.
const EDGES: [(&str, &[&str]); 7] = [
    ("conclave-proto", &[]),
    ("conclave-core", &["conclave-proto"]),
    ("conclave-primitives", &["conclave-core", "conclave-proto"]),
    (
        "conclave-server",
        &["conclave-core", "conclave-primitives", "conclave-proto"],
    ),
    ("conclave-client", &["conclave-proto"]),
    (
        "conclave",
        &["conclave-client", "conclave-proto", "conclave-server"],
    ),
    (
        "conclave-jepsen",
        &[
            "conclave-client",
            "conclave-core",
            "conclave-primitives",
            "conclave-proto",
        ],
    ),
];

/// What would bring threads, clocks or the network into what must be
/// deterministic.
const NOT_BELOW_CORE: [&str; 5] = ["tokio", "tonic", "hyper", "async-trait", "futures-util"];

/// What cargo prints.
fn cargo(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .arg("--offline")
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

#[test]
fn crates_know_only_whom_they_may() {
    let printed = cargo(&["metadata", "--format-version", "1", "--no-deps"]);
    let metadata: Value = serde_json::from_slice(&printed).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().unwrap();
    let allowed: BTreeMap<_, BTreeSet<_>> = EDGES
        .iter()
        .map(|(from, to)| (*from, to.iter().copied().collect()))
        .collect();
    assert_eq!(
        packages.len(),
        allowed.len(),
        "a crate that the list does not know"
    );
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let known = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|dependency| dependency["path"].is_string())
            .map(|dependency| dependency["name"].as_str().unwrap())
            .collect::<BTreeSet<_>>();
        let may = &allowed[name];
        assert!(
            known.is_subset(may),
            "{name} knows {known:?}, but may only know {may:?}"
        );
    }
}

#[test]
fn nothing_asynchronous_is_below_core_and_primitives() {
    for package in ["conclave-core", "conclave-primitives"] {
        let printed = cargo(&[
            "tree",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--package",
            package,
        ]);
        let tree = String::from_utf8(printed).unwrap();
        let names: BTreeSet<_> = tree
            .lines()
            .filter_map(|line| line.split(' ').next())
            .collect();
        assert!(names.contains("raft"), "the tree was read");
        for banned in NOT_BELOW_CORE {
            assert!(!names.contains(banned), "{package} depends on {banned}");
        }
    }
}
