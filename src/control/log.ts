/**
 * Events as log lines: one a line, at most one a second of a kind and port; what was left out is counted in the next.
 * A guest that misbehaves at line rate must not fill a disk.
 */
import type { RelayEvent } from "../datapath/relay.ts";

const INTERVAL_MS = 1000;

export class EventLog {
  readonly #stream: NodeJS.WritableStream;
  readonly #seen = new Map<string, { at: number; left: number }>();

  constructor(stream: NodeJS.WritableStream) {
    this.#stream = stream;
    // Whoever read the log is gone: the virtual machines are not.
    stream.on("error", () => undefined);
  }

  write(event: RelayEvent): void {
    const { subject, text } = describe(event);
    const key = `${subject} ${event.type}`;
    const now = performance.now();
    const seen = this.#seen.get(key);
    if (seen && now - seen.at < INTERVAL_MS) {
      seen.left++;
      return;
    }
    const suppressed = seen?.left ? ` (${seen.left} more of these left out)` : "";
    this.#seen.set(key, { at: now, left: 0 });
    this.#stream.write(`vhost-relay: ${subject}: ${text}${suppressed}\n`);
  }
}

function describe(event: RelayEvent): { subject: string; text: string } {
  switch (event.type) {
    case "connect":
      return { subject: event.port, text: "front-end connected" };
    case "disconnect":
      return {
        subject: event.port,
        text: event.error ? `front-end dropped: ${reasonOf(event.error)}` : "front-end left",
      };
    case "end":
      return { subject: event.port, text: "its one connection is gone, no other will come" };
    case "failure":
      return { subject: event.port, text: `cannot take a connection: ${reasonOf(event.error)}` };
    case "refusal":
      return { subject: event.port, text: `refused ${event.request}: ${event.error.message}` };
    case "up":
      return { subject: event.port, text: `interface ${event.name} is up` };
    case "down":
      return {
        subject: event.port,
        text: `interface ${event.name} is down and carries nothing; ip link set dev ${event.name} up`,
      };
    case "gone":
      return { subject: event.port, text: `interface ${event.name} was deleted; nothing is carried any more` };
    case "moved":
      return { subject: event.port, text: `interface ${event.name} is in another network namespace now` };
    case "mtu":
      return { subject: event.port, text: `interface ${event.name} has an MTU of ${event.mtu} bytes now` };
    case "fault":
      return { subject: event.port, text: `interface ${event.name}: ${event.error.message}` };
    case "broken":
      return { subject: event.port, text: `virtqueue ${event.virtqueue} stopped: the guest's driver broke its format` };
    case "trapped":
      return { subject: event.lane, text: `stopped by a trap, please report this: ${event.reason}` };
    case "method":
      return { subject: event.port, text: `interface ${event.name} is reached by ${methodOf(event)}` };
    case "unreachable":
      return { subject: event.lane, text: `does not run: ${event.reason}` };
    case "refused":
      return { subject: event.lane, text: `its file is reached by ${methodOf(event)}` };
    case "fatal":
      return { subject: "poller", text: `died: ${reasonOf(event.error)}` };
  }
}

function methodOf({ method, refused }: { method: string; refused: { method: string; reason: string }[] }): string {
  return [method, ...refused.map((other) => `not ${other.method}: ${other.reason}`)].join("; ");
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
