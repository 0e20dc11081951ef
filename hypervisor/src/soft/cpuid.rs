//! The CPU model: what CPUID says.
