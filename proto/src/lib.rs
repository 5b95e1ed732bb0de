//! Every schema of Conclave, in reading order:
//!
//! - [`v1`]: the native API, a stable contract (`conclave/v1/*.proto`);
//! - [`etcd`]: the etcd v3 API (`etcd/*.proto`), a contract with everything made for it;
//! - [`internal`]: log entries, checkpoints and peer messages
//!   (`conclave/internal/*.proto`), the contract between members and with the disk.
//!
//! Messages only; with the feature `grpc` also clients and servers of the
//! services. What the messages mean is written in the schemas.

#[cfg(feature = "grpc")]
pub mod codec;

/// The native API.
#[allow(warnings, clippy::all, reason = "generated; documented in the schema")]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/conclave.v1.rs"));
}

/// The etcd v3 API: a module for each of its packages.
#[allow(warnings, clippy::all, reason = "generated; documented in the schema")]
pub mod etcd {
    pub mod mvccpb {
        include!(concat!(env!("OUT_DIR"), "/mvccpb.rs"));
    }
    pub mod authpb {
        include!(concat!(env!("OUT_DIR"), "/authpb.rs"));
    }
    pub mod etcdserverpb {
        include!(concat!(env!("OUT_DIR"), "/etcdserverpb.rs"));
    }
    pub mod v3lockpb {
        include!(concat!(env!("OUT_DIR"), "/v3lockpb.rs"));
    }
    pub mod v3electionpb {
        include!(concat!(env!("OUT_DIR"), "/v3electionpb.rs"));
    }
}

/// Log entries, checkpoints and peer messages.
#[allow(warnings, clippy::all, reason = "generated; documented in the schema")]
pub mod internal {
    include!(concat!(env!("OUT_DIR"), "/conclave.internal.rs"));
}

/// All schemas as an encoded `FileDescriptorSet`, for the reflection service.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
