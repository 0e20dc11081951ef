//! virtio devices, each in two halves, and their PCI transport.
