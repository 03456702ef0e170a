/** `vhost-relay demo`: two built-in drivers exchange frames through a relay, every byte checked. */
import { readFileSync } from "node:fs";
import { ConfigError } from "../errors.ts";
import { runDemo } from "../demo/demo.ts";
import { exampleFrames } from "../demo/frames.ts";
import { LINKTYPE_ETHERNET, readPcap } from "../demo/pcap.ts";
import { LiveTable, summary } from "../demo/table.ts";

const ETHERNET_HEADER_SIZE = 14;

export async function demo(options: { seconds: number; forever?: boolean; pcap?: string }): Promise<void> {
  const frames = options.pcap === undefined ? exampleFrames() : captured(options.pcap);
  const stop = new AbortController();
  const interrupt = (): void => stop.abort();
  process.on("SIGINT", interrupt).on("SIGTERM", interrupt);
  const table = new LiveTable(process.stdout, process.env);
  try {
    const outcome = await runDemo({
      seconds: options.forever ? Infinity : options.seconds,
      frames,
      signal: stop.signal,
      onProgress: (progress) => table.update(progress),
      intervalMs: table.intervalMs,
    });
    process.stdout.write(summary(outcome));
    if (outcome.failure !== undefined) {
      process.stderr.write(`vhost-relay: demo failed: ${outcome.failure}\n`);
      process.exitCode = 1;
    }
  } finally {
    process.off("SIGINT", interrupt).off("SIGTERM", interrupt);
  }
}

/** The whole Ethernet frames of a capture file. */
function captured(path: string): Uint8Array[] {
  let file: Uint8Array;
  try {
    file = readFileSync(path);
  } catch (error) {
    throw new ConfigError(`--pcap ${path}: ${(error as Error).message}`);
  }
  const { linkType, packets } = readPcap(file);
  if (linkType !== LINKTYPE_ETHERNET) throw new ConfigError(`--pcap ${path}: link type ${linkType}, not Ethernet (1)`);
  const whole = packets.filter(
    ({ data, originalLength }) => data.length === originalLength && data.length >= ETHERNET_HEADER_SIZE,
  );
  if (whole.length === 0) throw new ConfigError(`--pcap ${path}: no frame in it was captured whole`);
  return whole.map(({ data }) => data);
}
