//! Compiles the schemas with protox, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const SCHEMAS: [&str; 13] = [
    "conclave/v1/session.proto",
    "conclave/v1/lock.proto",
    "conclave/v1/election.proto",
    "conclave/v1/cluster.proto",
    "conclave/v1/channel.proto",
    "conclave/internal/entry.proto",
    "conclave/internal/peer.proto",
    "conclave/internal/checkpoint.proto",
    "etcd/mvcc.proto",
    "etcd/auth.proto",
    "etcd/rpc.proto",
    "etcd/lock.proto",
    "etcd/election.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=conclave");
    println!("cargo:rerun-if-changed=etcd");
    let descriptors = protox::compile(SCHEMAS, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // The reflection service answers with these.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let grpc = env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        .build_client(grpc)
        .build_server(grpc)
        // Its `connect` would clash with the method of that name.
        .build_transport(false)
        .codec_path("crate::codec::Codec")
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
