/**
 * The control protocol as a fuzz target: sessions of legal and illegal messages, made of those that test/vhost-user draws at random,
 * some with a byte changed. Answers and what the device is told must be what the model of the state machine says.
 */
import fc from "fast-check";
import { type Command, type FdName, sequence } from "../vhost-user/session-commands.ts";
import { Model, Undecided } from "../vhost-user/session-model.ts";
import { runSequence, SessionFds } from "../vhost-user/session-run.ts";
import { Reader } from "./bytes.ts";
import type { Features } from "./engine.ts";

const SESSIONS = 300;
const COMMANDS_MAX = 80;
/** In the upper bits of a command's number: a byte of its payload is another one. */
const CHANGED = 0xc000;

let messages: Command[] | undefined;
let fds: SessionFds | undefined;

/** @throws AssertionError where session and model differ */
export async function runControl(input: Uint8Array): Promise<Features> {
  const commands = commandsOf(input);
  fds ??= new SessionFds();
  await runSequence(commands, fds);
  return featuresOf(commands);
}

/** A session in a form that outlives changes to how sessions are drawn. */
export interface KeptSession {
  commands: { request: number; ack: boolean; payload: string; fds: FdName[] }[];
}

export function keepControl(input: Uint8Array): KeptSession {
  const commands = commandsOf(input).map(({ request, ack, payload, fds }) => {
    return { request, ack, payload: payload.toString("hex"), fds };
  });
  return { commands };
}

/** @throws as runControl */
export async function replayControl({ commands }: KeptSession): Promise<void> {
  fds ??= new SessionFds();
  await runSequence(
    commands.map((command) => ({ ...command, payload: Buffer.from(command.payload, "hex") })),
    fds,
  );
}

/** Inputs that are sessions as they were drawn. */
export function controlSeeds(): Uint8Array[] {
  const lengths = drawn().map((session) => session.length);
  let first = 0;
  return lengths.slice(0, SESSIONS / 3).map((length) => {
    const numbers = Uint16Array.from({ length }, (_, i) => first + i);
    first += length;
    return new Uint8Array(numbers.buffer);
  });
}

function drawn(): Command[][] {
  return fc.sample(sequence, { numRuns: SESSIONS, seed: 46 });
}

function commandsOf(input: Uint8Array): Command[] {
  messages ??= drawn().flat();
  const reader = new Reader(input);
  const commands: Command[] = [];
  while (!reader.done && commands.length < COMMANDS_MAX) {
    const number = reader.u16();
    const command = messages[(number & 0x3fff) % messages.length]!;
    if (number < CHANGED || command.payload.length === 0) commands.push(command);
    else {
      const payload = Buffer.from(command.payload);
      payload[reader.u8() % payload.length] = reader.u8();
      commands.push({ ...command, payload });
    }
  }
  return commands;
}

/** Pairs of neighbours: what was asked, how it was answered, and which rings ran then. */
function featuresOf(commands: readonly Command[]): Features {
  const features: Features = new Map();
  const model = new Model();
  let before = 0;
  for (const command of commands) {
    let answer;
    try {
      answer = model.handle(command);
    } catch (error) {
      if (error instanceof Undecided) break;
      throw error;
    }
    const kind = typeof answer === "string" ? answer.length : 16 + (answer.payload.at(0) ?? 2) + answer.fds;
    const rings = model.device.rings.reduce((mask, ring, i) => mask | (ring ? 1 << i : 0), model.isPacked ? 16 : 0);
    const now = (command.request & 0x3f) | (kind << 6);
    const feature = ((Math.imul(before, 0x9e37_79b1) ^ Math.imul(now * 32 + rings, 0x85eb_ca6b)) >>> 10) & 0x3f_ffff;
    features.set(feature, (features.get(feature) ?? 0) + 1);
    before = now;
    if (answer === "drop") break;
  }
  return features;
}
