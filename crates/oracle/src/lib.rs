//! Tests only: a naive NetworkPolicy evaluator written from the Kubernetes documentation.
#![forbid(unsafe_code)]
