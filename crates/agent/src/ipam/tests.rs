//! Leases under crashes.
