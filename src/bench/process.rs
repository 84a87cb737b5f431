//! What the system says about a process: its processor time and its memory.

use std::time::Duration;

use anyhow::Context as _;

/// Ticks of `/proc/PID/stat` in a second: `USER_HZ`, which Linux has fixed at 100.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time that a process has used so far, in user space and in the kernel.
pub(super) fn cpu_time(id: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{id}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("{path} can't be read"))?;
    let ticks = ticks(&stat).with_context(|| format!("{path} is not understood"))?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Memory that a process keeps resident, in bytes.
pub(super) fn memory(id: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{id}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("{path} can't be read"))?;
    resident(&status).with_context(|| format!("{path} is not understood"))
}

/// `VmRSS`, which is in KiB whatever the pages are.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Fields 14 and 15. The second is a name in brackets, which may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_confuses_nobody() {
        let stat = "7 (a) b (c) R 1 7 7 0 -1 4194304 160 0 0 0 12 30 0 0 20 0 1 0 5 1 2";
        assert_eq!(ticks(stat), Some(42));
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        assert_eq!(resident("Name:\tx\nVmHWM:\t 9 kB\nVmRSS:\t    7 kB\n"), Some(7168));
        assert_eq!(resident("Name:\tVmRSS: 3 kB\n"), None);
        assert!(memory(std::process::id()).unwrap() > 1 << 20);
    }

    #[test]
    fn this_process_has_used_some_time() {
        let before = cpu_time(std::process::id()).unwrap();
        let mut spun = 0_u64;
        while cpu_time(std::process::id()).unwrap() == before {
            spun = std::hint::black_box(spun + 1);
        }
    }
}
