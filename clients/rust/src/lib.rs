//! skeleton
pub mod requests;
pub mod session_state;
