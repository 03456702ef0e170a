/** The host's end of the TAP bench: addresses, counters, pings. In the network namespace that tap.ts has made. */
import { execFile, spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";

const IPERF_ATTEMPTS = 10;

interface IperfReport {
  readonly error?: string;
  readonly end: { readonly sum_received?: { readonly bits_per_second: number } };
}

const execFileAsync = promisify(execFile);

/** Runs ip(8). @throws Error if it fails */
export function ip(command: string): void {
  const { error, status, stderr } = spawnSync("ip", command.split(" "), { encoding: "utf8" });
  if (error || status !== 0) throw new Error(`ip ${command}: ${error?.message ?? stderr}`);
}

/** Round-trip times in microseconds of those pings that were answered. */
export async function ping(address: string, count: number, intervalSeconds: number): Promise<number[]> {
  // it has status 1 if some were lost
  const command = ["ping", "-c", String(count), "-i", String(intervalSeconds), "-W", "1", address];
  const { stdout } = await execFileAsync("busybox", command).catch((error: { stdout: string }) => error);
  return Array.from(stdout.matchAll(/ time=([\d.]+) ms/g), ([, milliseconds]) => Number(milliseconds) * 1000);
}

/**
 * Mbit/s of TCP between the host and an iperf3 server on a guest.
 * @param seconds a whole number
 * @param options of the client
 */
export async function iperf(server: string, seconds: number, ...options: string[]): Promise<number> {
  const command = ["--json", "--client", server, "--time", String(seconds), ...options];
  for (let attempt = 1; ; attempt++) {
    const { stdout } = await execFileAsync("iperf3", command).catch((error: { stdout: string }) => error);
    const { error, end } = JSON.parse(stdout) as IperfReport;
    if (error === undefined) return (end.sum_received?.bits_per_second ?? 0) / 1e6;
    // a server needs a moment between two clients
    if (attempt === IPERF_ATTEMPTS) throw new Error(`iperf3 ${command.join(" ")}: ${error}`);
    await delay(200);
  }
}

/** What an interface has received from, and delivered to, whoever holds its queue. @throws Error if it is not there */
export function interfaceCounters(name: string): { received: number; receivedBytes: number; sent: number } {
  const line = readFileSync("/proc/net/dev", "latin1")
    .split("\n")
    .find((each) => each.trimStart().startsWith(`${name}:`));
  if (line === undefined) throw new Error(`no interface ${name} in this network namespace`);
  const fields = line
    .slice(line.indexOf(":") + 1)
    .trim()
    .split(/\s+/)
    .map(Number);
  return { received: fields[1]!, receivedBytes: fields[0]!, sent: fields[9]! };
}
