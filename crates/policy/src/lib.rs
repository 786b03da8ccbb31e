//! NetworkPolicy compiled to peer classes; evaluated and explained.
#![forbid(unsafe_code)]
