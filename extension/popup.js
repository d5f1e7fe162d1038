// Shows how things stand, pairs this browser with a gateway, and asks the worker to hand over.
const TEXTS = {
  pair_help: ["Copy the pairing link on the Accounts tab of your Flow2API, and paste it here.",
    "请在 Flow2API 管理页的“账号”页复制配对链接，粘贴到这里。"],
  pairing_link: ["Pairing link", "配对链接"], pair: ["Pair", "配对"],
  mistake: ["This is no pairing link. It looks like http://127.0.0.1:8000/#… , with the token at its end.",
    "这不是配对链接。它形如 http://127.0.0.1:8000/#…，令牌在末尾。"],
  gateway: ["Gateway", "网关"], account: ["Account", "账号"], handed_over: ["Handed over", "上次上报"],
  add: ["Add this browser's account", "添加此浏览器的账号"], unpair: ["Unpair", "解除配对"],
  connected: ["Connected", "已连接"], not_connected: ["Not connected", "未连接"], never: ["never", "从未"],
  sends: ["Reads the one session cookie of labs.google and sends it to this gateway. Nothing else leaves the browser.",
    "只读取 labs.google 的会话 cookie 并发送到此网关，其他数据不会离开浏览器。"],
  not_allowed: ["The browser does not let this extension reach the gateway and labs.google. Press the button below, "
    + "and allow it.", "浏览器未允许扩展访问该网关和 labs.google。请点击下面的按钮并选择允许。"],
  unpaired: ["The gateway does not accept this pairing link any more. Unpair, and paste the new one.",
    "网关不再接受此配对链接。请解除配对并粘贴新的链接。"],
  unreachable: ["The gateway does not answer. Is it running, and is its address right? This is tried again by itself.",
    "网关没有应答。请检查它是否在运行、地址是否正确。扩展会自动重试。"],
  refused: ["The gateway did not take the session:", "网关未接受该会话："],
  failed: ["It did not work, and is tried again by itself:", "未成功，将自动重试："],
  signed_out: ["This browser is signed out of Flow on labs.google. Sign in at labs.google/fx, and its account "
    + "comes back by itself. (Accounts that Google has moved to flow.google.com have no session there.)",
    "此浏览器未登录 labs.google 上的 Flow。请在 labs.google/fx 登录，账号会自动恢复。"
    + "（已被 Google 迁移到 flow.google.com 的账号在那里没有会话。）"],
};
const t = (key) => TEXTS[key][navigator.language.startsWith("zh") ? 1 : 0];
const $ = (id) => document.getElementById(id);
let pairing; // {address, token} as it is in storage

/** What the browser must let this extension reach. */
const originsOf = ({ address }) => ["https://labs.google/*", `${new URL(address).origin}/*`];

/** The address and the connection token of a pairing link; null if it is none. */
function readLink(text) {
  const match = /^(https?:\/\/[^\s#?@]+?)\/?#([!-~]{16,})$/.exec(text.trim());
  return match && URL.canParse(match[1]) ? { address: match[1], token: match[2] } : null;
}

async function render() {
  const stored = await chrome.storage.local.get(["pairing", "status"]);
  const { status = {} } = stored;
  pairing = stored.pairing;
  $("pairing").hidden = Boolean(pairing);
  $("paired").hidden = !pairing;
  if (!pairing) return;
  $("gateway").textContent = pairing.address;
  $("account").textContent = status.account ?? "–";
  $("handed_over").textContent = status.handedOver ? new Date(status.handedOver).toLocaleString() : t("never");
  const allowed = await chrome.permissions.contains({ origins: originsOf(pairing) });
  const problem = allowed ? status.problem : "not_allowed";
  $("problem").hidden = !problem;
  $("problem").textContent = problem ? `${t(problem)} ${status.detail ?? ""}` : "";
  const signal = AbortSignal.timeout(5000);
  const answers = await fetch(`${pairing.address}/health`, { signal }).then(() => true, () => false);
  const connected = answers && ![undefined, "unpaired", "not_allowed"].includes(problem);
  $("connection").textContent = t(connected ? "connected" : "not_connected");
  $("connection").className = connected ? "good" : "bad";
}

/** Has it handed over; asks first, where the browser does not let it reach the gateway yet. */
async function handOver() {
  $("add").disabled = true;
  try {
    await chrome.permissions.request({ origins: originsOf(pairing) });
    await chrome.runtime.sendMessage("hand over");
  } finally {
    $("add").disabled = false;
  }
}

$("pairing").addEventListener("submit", (event) => {
  event.preventDefault();
  pairing = readLink(event.target.link.value);
  $("mistake").hidden = Boolean(pairing);
  $("mistake").textContent = t("mistake");
  if (!pairing) return;
  // Not awaited: the browser asks only while it counts as an answer to the click. Where its question
  // closes this popup, the worker goes on by itself once it is allowed.
  chrome.storage.local.set({ pairing, status: {} });
  handOver();
});
$("add").addEventListener("click", handOver);
$("unpair").addEventListener("click", async () => {
  const [, gateway] = originsOf(pairing);
  await chrome.storage.local.clear();
  await chrome.action.setBadgeText({ text: "" });
  await chrome.permissions.remove({ origins: [gateway] });
});
chrome.storage.onChanged.addListener(render);
for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
document.documentElement.lang = navigator.language;
render();
