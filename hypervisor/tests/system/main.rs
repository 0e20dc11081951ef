//! The software CPU's system behaviour, one directed guest per rule: faults, paging, privilege, interrupts, timers,
//! strings across pages; and
//! random code on top.
//!
//! The guests see nothing but the public traits of the crate. What they find out they write into memory, mostly by
//! the handlers of [`guest`], which record every exception and interrupt.

mod guest;

mod faults;
mod interrupts;
mod paging;
mod privilege;
mod random;
mod strings;
mod timer;
