//! CNI types and the messages between Towpath's processes.
#![forbid(unsafe_code)]
