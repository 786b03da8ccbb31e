//! Validated nouns, parsed once from Kubernetes objects, and the desired state of a node.
#![forbid(unsafe_code)]
