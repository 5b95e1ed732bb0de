//! The etcd v3 API.

pub(crate) mod json;
