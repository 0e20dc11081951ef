//! One small guest on every backend: it computes in user mode, reads a virtio disk by interrupt and prints on the
//! serial port, through the whole machine. The same image gives the same answers everywhere, also when it is
//! saved and restored on its way.
//!
//! Where `/dev/kvm` does not open, the tests say so and do without it.

mod host;

use std::collections::BTreeSet;
use std::sync::Arc;

use host::{Answer, Micro, PAYLOAD_PAGES, Stop, backends, disk_image, expected_output};
use hypervisor::Hypervisor;

/// Runs to the end, answering disk requests; `at_stop` may exchange the guest at every stop before.
fn finish(mut micro: Micro, mut at_stop: impl FnMut(Micro) -> Micro) -> Micro {
    loop {
        let stop = micro.run();
        if stop == Stop::Off {
            return micro;
        }
        micro = at_stop(micro);
        if let Stop::Disk(request) = stop {
            // Every other request is answered while the guest waits for it, the rest before it looks.
            let when =
                if request.request.id % 2 == 0 { Answer::AtOnce } else { Answer::WhileItWaits };
            micro.answer(&request, when);
        }
    }
}

fn on_every_backend(test: impl Fn(&Arc<dyn Hypervisor>)) {
    for hypervisor in backends() {
        println!("on {}", hypervisor.name());
        test(&hypervisor);
    }
}

#[test]
fn the_same_image_gives_the_same_answers() {
    on_every_backend(|hypervisor| {
        let micro = finish(Micro::new(hypervisor), |micro| micro);
        assert_eq!(micro.output(), expected_output(&disk_image()), "on {}", hypervisor.name());
    });
}

#[test]
fn output_is_handed_out_as_it_is_made_where_nothing_else_stops_the_guest() {
    on_every_backend(|hypervisor| {
        let micro = finish(Micro::new(hypervisor), |micro| micro);
        let whole_lines = micro.longest_output() > 1;
        assert_eq!(whole_lines, hypervisor.counts_exactly(), "on {}", hypervisor.name());
    });
}

#[test]
fn it_goes_on_in_another_vm_from_every_stop() {
    on_every_backend(|hypervisor| {
        let mut stops = 0;
        let micro = finish(Micro::new(hypervisor), |micro| {
            stops += 1;
            micro.moved()
        });
        assert!(stops >= 12, "six checkpoints and six requests, not {stops}");
        assert_eq!(micro.output(), expected_output(&disk_image()), "on {}", hypervisor.name());
    });
}

#[test]
fn it_goes_back_in_place() {
    on_every_backend(|hypervisor| {
        let mut micro = Micro::new(hypervisor);
        for _ in 0..3 {
            assert_eq!(micro.run(), Stop::Checkpoint);
        }
        let saved = micro.save();
        let mut micro = finish(micro, |micro| micro);
        let first = micro.output();
        micro.restore(&saved);
        let micro = finish(micro, |micro| micro);
        assert_eq!(micro.output(), first);
        assert_eq!(first, expected_output(&disk_image()), "on {}", hypervisor.name());
    });
}

#[test]
fn every_page_that_changed_was_reported_dirty() {
    on_every_backend(|hypervisor| {
        let mut micro = Micro::new(hypervisor);
        let first = micro.take_dirty_pages();
        assert!(first.contains(&micro.code_page()), "what the host wrote counts: {first:?}");
        assert_eq!(micro.take_dirty_pages(), BTreeSet::new(), "a new round begins");

        let mut before = micro.pages();
        let mut all = BTreeSet::new();
        let mut micro = finish(micro, |mut micro| {
            let dirty = micro.take_dirty_pages();
            let now = micro.pages();
            for (page, (old, new)) in (0..).zip(before.iter().zip(&now)) {
                assert!(old == new || dirty.contains(&page), "page {page:#x} changed unnoticed");
            }
            before = now;
            all.extend(dirty);
            micro
        });
        all.extend(micro.take_dirty_pages());
        for page in PAYLOAD_PAGES {
            assert!(all.contains(&page), "user mode wrote page {page:#x}");
        }
        assert!(all.contains(&host::DATA_PAGE), "the disk wrote its page");
        // KVM also reports pages which it mapped for writing when they were read.
        if hypervisor.counts_exactly() {
            assert!(!all.contains(&micro.code_page()), "nobody writes code");
        }
        assert!(all.iter().all(|page| *page < PAYLOAD_PAGES.end), "nothing lies above: {all:?}");
    });
}

#[test]
fn a_reset_starts_it_over() {
    on_every_backend(|hypervisor| {
        let mut micro = finish(Micro::new(hypervisor), |micro| micro);
        let first = micro.output();
        micro.reset();
        let micro = finish(micro, |micro| micro);
        assert_eq!(micro.output(), first, "on {}", hypervisor.name());
    });
}
