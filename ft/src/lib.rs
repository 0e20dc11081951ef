//! Fault tolerance, pure.
