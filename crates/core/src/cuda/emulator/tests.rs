//! The emulator computes what a GPU would, and calls mistakes mistakes.

use crate::Error;
use crate::cuda::{Arg, Kernel, Launcher, Program, Properties};

static PROGRAM: Program = Program { name: "emulator", source: include_str!("tests.cu") };

/// Runs a kernel on some numbers, with blocks and threads in ascending order or reversed.
fn run(kernel: &dyn Fn() -> Kernel, numbers: &mut [f32], reversed: bool) -> Result<(), Error> {
    let gpu = Properties::of_arch((9, 0));
    let mut collected = Launcher::collect(&gpu);
    collected.launch(kernel())?;
    let numbers = Arg::Ptr(numbers.as_mut_ptr() as u64);
    Launcher::emulate(collected, reversed)?.launch(kernel().arg(numbers))
}

fn kernel(entry: &'static str, threads: u32) -> Kernel {
    Kernel::new(&PROGRAM, entry).threads(threads)
}

fn message(entry: &'static str, threads: u32) -> String {
    run(&|| kernel(entry, threads), &mut [0.0; 256], false).unwrap_err().to_string()
}

#[test]
fn warps_and_barriers() {
    for reversed in [false, true] {
        let mut numbers = [0.0; 256];
        run(&|| kernel("sums", 256).grid(2, 1, 1), &mut numbers, reversed).unwrap();
        // Σ of 0 to 255, and the lane before.
        assert!(numbers.iter().enumerate().all(|(i, &v)| v == 32_640.0 + (i as f32 + 31.0) % 32.0), "{numbers:?}");
    }
}

#[test]
fn products_of_tensor_cores() {
    // a [16, 16] and b [16, 8] of small integers, row-major, then d [16, 8].
    let a: Vec<f32> = (0..256).map(|i| (i * 7 % 13) as f32 - 6.0).collect();
    let b: Vec<f32> = (0..128).map(|i| (i * 5 % 11) as f32 - 5.0).collect();
    let mut numbers = [&a[..], &b, &[0.0; 128]].concat();
    run(&|| kernel("multiply", 32), &mut numbers, false).unwrap();
    for (i, got) in numbers[384..].iter().enumerate() {
        let expected: f32 = (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum();
        assert_eq!(*got, expected, "element {i}");
    }
}

#[test]
fn asynchronous_copies_arrive_when_they_are_waited_for() {
    let mut numbers: Vec<f32> = (0..64).map(|i| i as f32).collect();
    run(&|| kernel("copy", 32), &mut numbers, false).unwrap();
    assert!(numbers[..32].iter().all(|v| v.is_nan()), "before they are waited for");
    assert_eq!(numbers[32..], (0..32).map(|i| i as f32).collect::<Vec<_>>());
}

#[test]
fn shared_memory_begins_as_nan() {
    let mut numbers = [0.0; 64];
    run(&|| kernel("unwritten", 32).shared(128), &mut numbers, false).unwrap();
    assert!(numbers.iter().all(|v| v.is_nan()));
}

#[test]
fn a_missing_barrier_shows_in_one_of_the_orders() {
    let [mut forwards, mut backwards] = [[0.0; 256]; 2];
    run(&|| kernel("race", 64), &mut forwards, false).unwrap();
    run(&|| kernel("race", 64), &mut backwards, true).unwrap();
    assert_ne!(forwards.map(f32::to_bits), backwards.map(f32::to_bits));
}

#[test]
fn mistakes_are_errors() {
    let contains = |message: String, part: &str| assert!(message.contains(part), "{message}");
    contains(
        message("some_leave", 64),
        "emulator, some_leave: block (0, 0, 0): thread 0 waits at __syncthreads for threads",
    );
    contains(message("different_barriers", 64), "threads wait at __syncthreads and at __syncthreads_or");
    contains(message("half_a_warp", 32), "waits at __shfl_xor_sync for threads that never come there");
    contains(message("misaligned", 32), "a misaligned access");
    contains(message("out_of_bounds", 32), "index 4 is out of bounds");
    contains(message("race", 128), "128 threads, but __launch_bounds__(64)");
    contains(message("two_arguments", 32), "takes 2 arguments, but got 1");
    contains(message("missing", 32), "there is no such kernel");
    let large = run(&|| kernel("unwritten", 32).shared((227 << 10) - 64), &mut [0.0; 64], false);
    contains(large.unwrap_err().to_string(), "bytes of shared memory");
}
