//! The machine itself: images, processors, memory, and every way to end.

use std::time::Duration;

use libtest_mimic::Trial;
use tests::guest::{End, Op};
use tests::vm::{Kernel, Share, Vm};

use crate::harness::{Outcome, Places, ensure, ensure_ended, ensure_eq, own_trial};
use crate::lifecycle::unbind_with_mappings_live;

type MachineCheck = fn(&Kernel, &Places) -> Outcome;

/// The checks that boot a machine of their own.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let checks: &[(&str, MachineCheck)] = &[
        ("power-off-is-0", power_off),
        ("reboot-is-32", reboot),
        ("triple-fault-is-33", triple_fault),
        ("panic-is-34", panic),
        ("timeout-is-124", timeout),
        ("bad-arguments-are-125", bad_arguments),
        ("elf-image-boots", elf),
        ("long-console-lines-survive", console),
        ("memory-72m", memory_72m),
        ("memory-80m", memory_80m),
        ("memory-64m-is-too-little", memory_64m),
        ("memory-6g", memory_6g),
        ("cpus-8", cpus_8),
        ("cpus-32", cpus_32),
        ("default-window", default_window),
        ("guests-of-its-own", nested),
        ("device-is-taken-away-with-mappings-live", unbind_with_mappings_live),
    ];
    for &(name, check) in checks {
        trials.push(own_trial(kernel, &format!("machine/{name}"), places, check));
    }
}

/// Only a guest that is to have them has the instructions for guests of its own.
fn nested(kernel: &Kernel, _: &Places) -> Outcome {
    for (options, expected) in [(&[] as &[&str], false), (&["--nested"], true)] {
        let builder = options.iter().fold(Vm::builder(kernel), |builder, option| builder.argument(*option));
        let mut vm = builder.boot()?;
        let info = vm.read_text("/proc/cpuinfo")?;
        let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = flags.split_whitespace().any(|flag| ["svm", "vmx"].contains(&flag));
        ensure_eq!(has, expected, "svm or vmx with {options:?}: {flags}");
        ensure_ended(&vm.power_off()?, 0, "power-off")?;
    }
    Ok(())
}

fn power_off(kernel: &Kernel, _: &Places) -> Outcome {
    let vm = Vm::builder(kernel).boot()?;
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

fn reboot(kernel: &Kernel, _: &Places) -> Outcome {
    let vm = Vm::builder(kernel).boot()?;
    ensure_ended(&vm.end(End::Reboot)?, 32, "reset")
}

fn triple_fault(kernel: &Kernel, _: &Places) -> Outcome {
    let vm = Vm::builder(kernel).cmdline_extra("reboot=t").boot()?;
    ensure_ended(&vm.end(End::Reboot)?, 33, "crash")
}

fn panic(kernel: &Kernel, _: &Places) -> Outcome {
    let vm = Vm::builder(kernel).boot()?;
    let ended = vm.end(End::Panic)?;
    ensure_ended(&ended, 34, "panic")?;
    ensure!(ended.console.contains("Kernel panic"), "the console does not say why:\n{}", ended.console);
    Ok(())
}

fn timeout(kernel: &Kernel, _: &Places) -> Outcome {
    let vm = Vm::builder(kernel).argument("--timeout").argument("3s").start()?;
    ensure_ended(&vm.wait()?, 124, "timeout")
}

/// What cannot be is refused before anything starts, by name.
fn bad_arguments(kernel: &Kernel, _: &Places) -> Outcome {
    let refused = |share: Share, named: &str| -> Outcome {
        let ended = Vm::builder(kernel).share(share).start()?.wait()?;
        ensure_eq!(ended.status, Some(125), "the exit status\n{}", ended.console);
        ensure!(ended.console.contains(named), "the error does not say {named:?}:\n{}", ended.console);
        Ok(())
    };
    refused(Share::new("t", "/no/such/directory"), "/no/such/directory")?;
    refused(Share::new("t", "/tmp").window("33M"), "34M")?;
    refused(Share::new("t", "/tmp").dax("allways"), "always")?;
    refused(Share::new(&"t".repeat(37), "/tmp"), "36")
}

fn elf(kernel: &Kernel, _: &Places) -> Outcome {
    let mut vm = Vm::builder(&kernel.clone().elf()).boot()?;
    let found = vm.read_text("/proc/version")?;
    let version = kernel.name().trim_end_matches("-cloud");
    ensure!(found.contains(&format!("Linux version {version}.")), "booted {found}");
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

fn console(kernel: &Kernel, _: &Places) -> Outcome {
    let mut vm = Vm::builder(kernel).boot()?;
    for len in [1, 4095, 4096, 65_536] {
        let text: String = ('a'..='z').cycle().take(len).collect();
        let echo: String = vm.call(&Op::Echo(text.clone()))?;
        ensure!(echo == text, "{len} characters came back as {}", echo.len());
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// What the kernel counts must be what was given, less what it needs for itself.
fn memory(kernel: &Kernel, size: &str, least: u64, most: u64) -> Outcome {
    let mut vm = Vm::builder(kernel).memory(size).boot()?;
    let total = vm.meminfo_kib("MemTotal")? >> 10;
    ensure!((least..=most).contains(&total), "MemTotal is {total} MiB of {size}");
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// About the least in which these kernels live with this initramfs; the images have no room to unpack themselves then.
fn memory_72m(kernel: &Kernel, _: &Places) -> Outcome {
    memory(kernel, "72M", 8, 72)
}

/// About the least in which these images unpack themselves, from 16 MiB to 72 MiB.
fn memory_80m(kernel: &Kernel, _: &Places) -> Outcome {
    memory(kernel, "80M", 16, 80)
}

/// Too little memory is said to be that: by daxvm, where the kernel would end beyond it, and else by the kernel, which
/// comes to its first driver.
fn memory_64m(kernel: &Kernel, _: &Places) -> Outcome {
    let ended = Vm::builder(&kernel.clone().elf()).memory("64M").start()?.wait()?;
    let (status, words) = match kernel.name() {
        "6.12-cloud" => (125, "raise --memory"),
        _ => (34, "System is deadlocked on memory"),
    };
    ensure_eq!(ended.status, Some(status), "the exit status\n{}", ended.console);
    ensure!(ended.console.contains(words), "not said to be a lack of memory:\n{}", ended.console);
    Ok(())
}

/// Beyond the hole below 4 GiB.
fn memory_6g(kernel: &Kernel, _: &Places) -> Outcome {
    memory(kernel, "6G", 5800, 6144)
}

fn cpus(kernel: &Kernel, cpus: u32) -> Outcome {
    let mut vm = Vm::builder(kernel).cpus(cpus).deadline(Duration::from_secs(300)).boot()?;
    let online = vm.read_text("/sys/devices/system/cpu/online")?;
    ensure_eq!(online.trim(), format!("0-{}", cpus - 1), "processors online");
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

fn cpus_8(kernel: &Kernel, _: &Places) -> Outcome {
    cpus(kernel, 8)
}

fn cpus_32(kernel: &Kernel, _: &Places) -> Outcome {
    cpus(kernel, 32)
}

/// A share without a word about its window has one, and it costs the guest little.
fn default_window(kernel: &Kernel, places: &Places) -> Outcome {
    let dir = tempfile::tempdir_in(places.dir("tmpfs"))?;
    std::fs::write(dir.path().join("file"), "shared")?;
    let mut vm = Vm::builder(kernel).share(Share::new("t", dir.path())).boot()?;
    let device = vm.virtio_fs_devices()?.into_iter().next().ok_or("no virtio-fs device")?;
    ensure_eq!(device.driver.as_deref(), Some("virtio-pci"));
    let largest = device.resources.iter().map(|(start, end, _)| end - start + 1).max().unwrap_or(0);
    // 16 MiB of guest memory a GiB of window, and at most about 2 % of 512 MiB.
    ensure!((32 << 20..=1 << 30).contains(&largest), "the window's BAR is {} MiB", largest >> 20);
    vm.mount("t", "/mnt", "dax=always")?;
    ensure_eq!(vm.read_bytes("/mnt/file", 0, 10)?, b"shared");
    vm.umount("/mnt")?;
    ensure_ended(&vm.power_off()?, 0, "power-off")
}
