// Follows the part of a page that changes, as server-sent events. Without this script the page reads and works the same,
// but stands still until it is loaded again.
"use strict";

(() => {
  const part = document.querySelector("[data-live]");
  if (!part || !("EventSource" in window)) return;

  const bar = document.createElement("div");
  bar.className = "live-bar";
  const state = document.createElement("span");
  state.setAttribute("role", "status");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  bar.append(state, button);
  part.before(bar);

  let source = null;
  let held = null;

  const say = (kind, words) => {
    bar.dataset.state = kind;
    if (state.textContent !== words) state.textContent = words;
  };

  // What somebody is about to press or reads aloud keeps the focus, and a chat that was read to its end stays there.
  const show = (html) => {
    const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
    const root = document.documentElement;
    const atEnd = part.querySelector(".chat") && root.scrollHeight - root.clientHeight - root.scrollTop < 80;
    part.innerHTML = html;
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    if (atEnd) root.scrollTop = root.scrollHeight;
    part.dispatchEvent(new CustomEvent("live"));
  };

  // Nothing moves under somebody's hand: text that is selected and buttons that are held down wait.
  const isBusy = () => {
    const selection = document.getSelection();
    return (
      (selection && !selection.isCollapsed && part.contains(selection.anchorNode)) || part.matches(":active")
    );
  };
  const showSoon = () => {
    if (held === null) return;
    if (isBusy()) {
      setTimeout(showSoon, 500);
      return;
    }
    const html = held;
    held = null;
    show(html);
  };

  const stop = () => {
    source?.close();
    source = null;
    held = null;
  };

  const start = () => {
    stop();
    say("waiting", "Connecting");
    button.textContent = "Pause";
    source = new EventSource(part.dataset.live);
    source.addEventListener("open", () => say("live", "Live"));
    source.addEventListener("page", (event) => {
      say("live", "Live");
      held = JSON.parse(event.data);
      showSoon();
    });
    source.addEventListener("trouble", () => say("stale", "Not up to date: the server can't read the database"));
    source.addEventListener("error", () => {
      if (source?.readyState === EventSource.CLOSED) {
        stop();
        say("stale", "Not followed live");
        button.textContent = "Follow";
      } else {
        say("stale", "Not up to date: the connection is lost");
      }
    });
  };

  button.addEventListener("click", () => {
    if (source) {
      stop();
      say("paused", "Paused");
      button.textContent = "Follow";
    } else {
      start();
    }
  });
  window.addEventListener("pagehide", stop);
  window.addEventListener("pageshow", (event) => {
    if (event.persisted) start();
  });
  start();
})();
