// Reads one cookie of labs.google and hands it to the gateway that this browser is paired with:
// by itself when it is new, and when the popup asks. What came of it is in storage, as `status`.
const LABS = "https://labs.google/fx/api/auth/session"; // an address that the cookie is sent to
const COOKIE = "__Secure-next-auth.session-token";
const SETTLE_MS = 1000; // the parts of a long cookie are set one after the other
const CHECK_MINUTES = 10; // for what no change of the cookie brings about: the gateway was away
const PATIENCE_MS = 25000; // the browser ends a worker whose fetch takes 30 s

/** What the browser must let this extension reach. */
const originsOf = ({ address }) => ["https://labs.google/*", `${new URL(address).origin}/*`];

/** The session, put together where its cookie came in parts; "" when there is none. */
async function readSession() {
  const read = async (name) => (await chrome.cookies.get({ url: LABS, name }))?.value ?? "";
  let session = await read(COOKIE);
  if (session) return session;
  for (let part = 0; ; part += 1) {
    const value = await read(`${COOKIE}.${part}`);
    if (!value) return session;
    session += value;
  }
}

/** What is kept of a session, to know it again. */
async function digestOf(session) {
  const bytes = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(session));
  return Array.from(new Uint8Array(bytes), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Sends it -> {problem, detail, account}. The problem "" is none; the detail is the gateway's. */
async function send({ address, token }, session) {
  try {
    const reply = await fetch(`${address}/api/plugin/update-token`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ session_token: session }),
      credentials: "omit",
      redirect: "error", // the token is for this address alone
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    const answer = await reply.json().catch(() => ({}));
    if (reply.ok && answer.success) return { problem: "", account: answer.email };
    if (reply.status === 401) return { problem: "unpaired" };
    if (reply.status === 400) return { problem: "refused", detail: answer.detail };
    return { problem: "failed", detail: answer.detail ?? `HTTP ${reply.status}` };
  } catch {
    return { problem: "unreachable" };
  }
}

const showProblem = (problem) => chrome.action.setBadgeText({ text: problem ? "!" : "" });

/** Looks at the cookie, and hands it over unless it has been answered already. */
async function handOver(again) {
  const { pairing, status = {} } = await chrome.storage.local.get(["pairing", "status"]);
  if (!pairing) return;
  const allowed = await chrome.permissions.contains({ origins: originsOf(pairing) });
  const session = allowed ? await readSession() : "";
  const digest = session && (await digestOf(session));
  if (session && digest === status.answered && !again) {
    await showProblem(status.problem); // the browser forgets it at its end
    return;
  }
  const nothing = { problem: allowed ? "signed_out" : "not_allowed" };
  const outcome = session ? await send(pairing, session) : nothing;
  const now = { ...status, detail: "", ...outcome };
  if (!outcome.problem) now.handedOver = Date.now();
  // A refusal will not change; everything else is tried again, by the alarm.
  now.answered = ["", "refused", "unpaired"].includes(outcome.problem) ? digest : "";
  const { pairing: today } = await chrome.storage.local.get("pairing");
  if (today?.address !== pairing.address || today.token !== pairing.token) return; // meanwhile
  await chrome.storage.local.set({ status: now });
  await showProblem(now.problem);
}

let queue = Promise.resolve();

/** One hand-over after the other. */
function look(again = false) {
  queue = queue.then(() => handOver(again)).catch((error) => console.error(error));
  return queue;
}

let settling;
chrome.cookies.onChanged.addListener(({ cookie }) => {
  if (!cookie.domain.endsWith("labs.google") || !cookie.name.startsWith(COOKIE)) return;
  clearTimeout(settling);
  settling = setTimeout(look, SETTLE_MS);
});
chrome.runtime.onMessage.addListener((message, sender, answer) => {
  look(true).then(() => answer(true));
  return true; // the answer comes later
});
chrome.permissions.onAdded.addListener(() => look(true));
chrome.alarms.onAlarm.addListener(() => look());
chrome.runtime.onStartup.addListener(() => look());
chrome.runtime.onInstalled.addListener(() => look());
// Whenever the worker starts: the browser may have dropped it.
chrome.alarms.get("look").then((alarm) => alarm ?? chrome.alarms.create("look", { periodInMinutes: CHECK_MINUTES }));
