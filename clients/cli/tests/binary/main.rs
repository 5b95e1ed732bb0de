//! The built binary: real processes, sockets, files and signals.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]
#![expect(unreachable_pub, reason = "shared between tests, not an interface")]

mod check_data;
mod cluster;
mod commands;
mod damage;
mod dev_command;
mod disk;
mod elect_command;
mod garbage;
mod install;
mod kv_command;
mod lock_command;
mod overload;
mod serve_command;
mod support;
