//! Pure decisions: service tables, routes, address allocation, DNS answers.
#![forbid(unsafe_code)]
