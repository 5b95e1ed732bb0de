//! skeleton
pub mod disk;
pub mod ids;
pub mod keyspace;
pub mod limits;
pub mod log;
pub mod machine;
pub mod node;
pub mod replica;
pub mod session;
pub mod system;
