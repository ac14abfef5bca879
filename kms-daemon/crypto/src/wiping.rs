//! An allocator that wipes what is given back to it: plaintext passes through many buffers, the libraries' among them,
//! and none of them has to remember to clean up.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{Ordering, compiler_fence};

/// The system's allocator, with every block zeroed before it is freed. To be a program's `#[global_allocator]`; what
/// C++ allocates does not pass through it.
pub struct WipingAllocator;

/// Zeroes a block that is about to be freed.
///
/// # Safety
/// `block` must be good for writes of `bytes` bytes.
unsafe fn wipe(block: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { block.write_bytes(0, bytes) };
    // The address escapes, so that the writes are not left out as ones that nobody reads.
    std::hint::black_box(block);
    compiler_fence(Ordering::SeqCst);
}

// SAFETY: every block is one of the system allocator's, taken and given back with the layout that it was asked for with.
unsafe impl GlobalAlloc for WipingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the system allocator's, too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives up a block of `layout`, whose bytes are its own until it is freed.
        unsafe {
            wipe(block, layout.size());
            System.dealloc(block, layout);
        }
    }

    // The trait's own `realloc` makes a new block, copies and deallocates the old one, which wipes it. The system's would
    // move it, and leave a copy.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_is_zero() {
        let layout = Layout::from_size_align(4096, 16).unwrap();
        // SAFETY: the block is written and freed within its layout. Once wiped it is read before it is freed: `wipe` is what
        // `dealloc` calls.
        unsafe {
            let block = WipingAllocator.alloc(layout);
            assert!(!block.is_null());
            block.write_bytes(0x5a, 4096);
            let grown = WipingAllocator.realloc(block, layout, 8192);
            assert_eq!(*grown.add(4095), 0x5a);
            wipe(grown, 8192);
            assert!(
                std::slice::from_raw_parts(grown, 8192)
                    .iter()
                    .all(|byte| *byte == 0)
            );
            WipingAllocator.dealloc(grown, Layout::from_size_align(8192, 16).unwrap());
        }
    }
}
