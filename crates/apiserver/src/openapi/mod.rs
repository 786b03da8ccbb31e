//! OpenAPI documents of the built-in kinds, made from their schemas when first asked for.
