//! The merge algorithms: strategic merge patches, server-side apply and the field sets of managedFields. All pure.

pub(crate) mod apply;
pub(crate) mod fields;
pub(crate) mod managed;
pub(crate) mod strategic;

#[cfg(test)]
mod tests;
