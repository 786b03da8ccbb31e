//! CNI (specification 1.1.0) types, and the messages between `towpath-cni` and the agent.
