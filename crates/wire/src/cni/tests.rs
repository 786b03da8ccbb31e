//! Versions, shapes, refusals.
