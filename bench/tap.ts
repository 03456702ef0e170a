/**
 * `npm run bench:tap`: a VM's frames to and from a TAP interface. See --help, which is `help` below.
 *
 * All of it happens in a network namespace of its own, made by starting this program anew under unshare(1): nothing
 * is left behind. On a shared machine read the ratios, never the times: everything compared takes turns in one run.
 */
import { spawnSync } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import { availableParallelism, cpus, release } from "node:os";
import { parseArgs } from "node:util";
import { missingTools } from "../test/guests/tools.ts";
import { INITRAMFS_TOOLS } from "../test/guests/initramfs.ts";
import type { Tool } from "../test/guests/tools.ts";
import { compareLatency } from "./tap-latency.ts";
import { compareLoops } from "./tap-loop.ts";
import { comparePeers } from "./tap-peers.ts";
import { compareQemu } from "./tap-qemu.ts";

const help = `npm run bench:tap -- [OPTIONS]

  loop     CPU time a frame of the core with each way of asking the kernel (io_uring, aio, rw), against a C program's
           loop of write() or read(), on one TAP interface in one thread. rate: of C's; 1.00 is as fast as C
  peers    a VM that sends (DPDK testpmd, virtio_user) through the relay, and through DPDK's net_vhost and net_tap:
           frames a second, CPU time a frame
  qemu     ping and iperf3 TCP between the host and a QEMU guest (TCG): QEMU's own TAP against vhost-user and the relay
  latency  ping from the host to a user-mode Linux guest, with --poll interrupt, adaptive and busy; CPU of an idle relay

Options:
  --only PARTS     some of them, such as loop,latency; default: all that can run here
  --rounds N       turns that each contestant gets; default 7
  --cpus A,B       CPU of the loops and of back-ends, CPU of testpmd's VM; default 0,1 if there are two
  --rings RINGS    of the loop: split or packed; default split
  --json           the loop's figures as one line of JSON at the end
  --help

Needs root (or user namespaces that anybody may make) and /dev/net/tun; gcc, testpmd, QEMU, user-mode Linux for their
parts.`;

const PARTS = ["loop", "peers", "qemu", "latency"] as const;
type Part = (typeof PARTS)[number];

interface RunOptions {
  rounds: number;
  first: number;
  second: number;
}

const RUNS: Record<Part, { tools: Tool[]; run: (options: RunOptions) => Promise<void> }> = {
  loop: {
    tools: [],
    run: async ({ rounds, first: cpu }) => {
      const figures = compareLoops({ rounds, cpu, packed: options.rings === "packed" });
      if (options.json) console.log(JSON.stringify(figures));
    },
  },
  peers: {
    tools: ["dpdk-testpmd"],
    run: ({ rounds, first, second }) => comparePeers({ rounds, backEndCpu: first, guestCpu: second }),
  },
  qemu: {
    tools: ["qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS],
    run: compareQemu,
  },
  latency: {
    tools: ["linux.uml", ...INITRAMFS_TOOLS],
    run: ({ rounds, first: cpu }) => compareLatency({ rounds, cpu }),
  },
};

const { values: options } = parseArgs({
  options: {
    only: { type: "string", default: PARTS.join() },
    rounds: { type: "string", default: "7" },
    cpus: { type: "string", default: `0,${Math.min(1, availableParallelism() - 1)}` },
    rings: { type: "string", default: "split" },
    json: { type: "boolean", default: false },
    help: { type: "boolean", default: false },
  },
});
const IN_NAMESPACE = "VHOST_RELAY_BENCH_NAMESPACE";

if (options.help) console.log(help);
else if (process.env[IN_NAMESPACE] === undefined) process.exitCode = runInNamespace();
else await run();

/**
 * This program again, in a network namespace of its own, and as the first process of a PID namespace: what it has started
 * ends with it, stopped or not. @returns its exit status
 */
function runInNamespace(): number {
  const isRoot = process.getuid?.() === 0;
  if (!existsSync("/dev/net/tun"))
    return fail("no /dev/net/tun: load the module (modprobe tun), or give it to the container");
  const namespaces = [...(isRoot ? [] : ["--user", "--map-root-user"]), "--net", "--pid", "--fork", "--mount-proc"];
  const test = spawnSync("unshare", [...namespaces, "true"], { encoding: "utf8" });
  if (test.error) return fail(`no unshare(1): apt-get install util-linux (${test.error.message})`);
  if (test.status !== 0) {
    const cause = isRoot ? "CAP_SYS_ADMIN is missing" : "run it as root, or allow user namespaces to everybody";
    return fail(`cannot make a network namespace: ${test.stderr.trim()}; ${cause}`);
  }
  const program = [process.execPath, import.meta.filename, ...process.argv.slice(2)];
  const command = [...namespaces, "--kill-child", ...program];
  const { status } = spawnSync("unshare", command, { stdio: "inherit", env: { ...process.env, [IN_NAMESPACE]: "1" } });
  return status ?? 1;
}

function fail(reason: string): number {
  console.error(`bench:tap: ${reason}`);
  return 1;
}

async function run(): Promise<void> {
  // The first process of a namespace gets no signal that it does not ask for.
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(1));
  const rounds = Number(options.rounds);
  const [first = 0, second = 1] = options.cpus.split(",").map(Number);
  const parts = options.only.split(",") as Part[];
  const unknown = parts.find((part) => !PARTS.includes(part));
  if (unknown !== undefined) throw new RangeError(`--only ${unknown}: the parts are ${PARTS.join(", ")}`);
  // the host's own IPv6 chatter
  if (existsSync("/proc/sys/net/ipv6")) writeFileSync("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
  console.log(`${cpus()[0]?.model}, ${availableParallelism()} CPUs, Linux ${release()}, Node ${process.version}`);

  for (const part of parts) {
    const missing = missingTools(...RUNS[part].tools);
    if (missing !== undefined) console.log(`\n${part}: skipped: ${missing}`);
    else await RUNS[part].run({ rounds, first, second });
  }
}
