// Panes with a picture of a graph: alone, or of the graphs before and after a pass side by side.
import {bytes,big,el,facts,link,percent,plural} from './elements.js';
import {D,MODULE,NAME,R,arrayOf,graphAt,inputs,of,outputs,word} from './ops.js';
import {HEAD,KIND_NAMES,LEADING,draw,linesOf,svgFile,timeOf,titleOf} from './picture.js';
import {OUT,ancestors,treeOf} from './tree.js';
import {panel,pick,valueDetails} from './graph.js';
import {loadOf} from './routing.js';

const SHOWN=40; // boxes that are opened without a click
export const panes=[];

// What fills the graph's view; `mountPanes` draws it once it has a width.
export function pictures(G,tools){
  panes.length=0;
  const steps=D.functions[G.f].steps,names=i=>D.comparison?steps[i].name:i===G.step?`after ${steps[i].name}`:`before ${steps[G.step].name}`;
  const ids=[G.step-1,G.step].map(s=>new Set(s<0?[]:graphAt(G.f,s)));
  const sides=G.changes?[[G.step-1,'gone',ids[1],D.comparison?'only in A':'removed'],[G.step,'new',ids[0],D.comparison?'only in B':'added']]:[[G.step,'',null,'']];
  for(const[step,mark,other,markWord]of sides){
    const status=new Map(other?graphAt(G.f,step).filter(id=>!other.has(id)).map(id=>[id,true]):[]);
    panes.push(pane(G,{step,mark,markWord,status,label:G.changes?names(step):`Graph ${of} ${steps[step].name}`}));
  }
  if(!G.opened){
    G.opened=new Set(panes.flatMap(p=>p.firstOpen(G.wanted)));
    G.wanted=null;
  }
  if(G.picked)for(const p of panes)if(p.step===G.picked[1])p.openTo(G.picked[2]);
  const button=(name,label,act)=>el('button',{type:'button','aria-label':label,title:label,onclick:act},name);
  tools.append(el('span',{class:'choice'},button('−','Smaller',()=>zoom(1/1.2)),button('+','Larger',()=>zoom(1.2)),button('Fit','Fit the width',fit)),
    el('span',{class:'choice'},button('SVG','Save the picture as SVG',()=>save(false)),button('PNG','Save the picture as PNG',()=>save(true))),
    link('Open all',()=>{G.opened=new Set(panes.flatMap(p=>p.keys()));panes.forEach(p=>p.redraw())}),
    link('Close all',()=>{G.opened=new Set();panes.forEach(p=>p.redraw())}));
  return[el('div',{class:'legend'},...KIND_NAMES.map((n,i)=>el('span',{class:'key'},el('i',{class:`k${i}`}),n))),
    el('div',{class:'panes'},...panes.map(p=>p.element))];
}
// All panes have one scale; `at` is the point of the screen that stays, of a pane.
export function zoom(by,at){
  const z=Math.max(0.05,Math.min(3,panes[0].zoom*by));
  panes.forEach(p=>p.zoomTo(z,at));
}
export function fit(){panes.forEach(p=>{p.zoom=0});mountPanes()}
const LARGEST=16384,AREA=1<<27; // of a canvas, which has two pixels a point where it can
async function save(asPng){
  const{width,height,text}=svgFile(panes);
  let blob=new Blob([text],{type:'image/svg+xml'});
  if(asPng){
    const image=new Image(),scale=Math.min(2,LARGEST/Math.max(width,height),Math.sqrt(AREA/width/height));
    image.src=`data:image/svg+xml,${encodeURIComponent(text)}`;
    await image.decode();
    const canvas=el('canvas',{width:width*scale,height:height*scale});
    canvas.getContext('2d').drawImage(image,0,0,canvas.width,canvas.height);
    blob=await new Promise(done=>canvas.toBlob(done));
  }
  el('a',{href:URL.createObjectURL(blob),download:`${D.title} ${panes.at(-1).label}.${asPng?'png':'svg'}`.replace(/[\\/:]/g,'-')}).click();
}
export function mountPanes(){
  if(!panes[0]?.element.isConnected)return;
  panes.forEach(p=>p.redraw());
  const zoom=Math.min(...panes.map(p=>p.zoom));
  for(const p of panes)if(p.zoom>zoom)p.redraw(zoom);
}
export function reveal(node){
  if(!node)return;
  const frame=node.closest('.frame-scroll'),wide=innerWidth>900;
  if(frame){
    const a=node.getBoundingClientRect(),b=frame.getBoundingClientRect();
    frame.scrollTop+=a.top-b.top-(wide?(b.height-a.height)/2:30);
    frame.scrollLeft+=a.left-b.left-(b.width-a.width)/2;
  }
  (frame??node).scrollIntoView({block:!wide?'start':frame?'nearest':'center'});
  node.focus({preventScroll:true});
}

function pane(G,{step,mark,markWord,status,label}){
  const{root,leaves}=treeOf(G.f,step,status),boxes=new Map();
  const each=(box,act)=>{for(const c of box.children){act(c);each(c,act)}};
  each(root,box=>boxes.set(box.key,box));
  const frame=el('div',{class:'frame-scroll',onclick:clicked,onkeydown:typed,onpointerdown:held,onpointermove:dragged,
    onwheel:e=>{if(e.ctrlKey||e.metaKey){e.preventDefault();zoom(Math.exp(-e.deltaY/300),e)}}});
  const count=status.size?el('span',{class:mark},`${mark==='gone'?'−':'+'}${status.size}`):'';
  const p={step,mark,markWord,label,side:mark||'one',zoom:0,get open(){return G.opened},
    element:el('figure',{class:'pane'},G.changes?el('figcaption',{},label,' ',count):'',frame),
    find:act=>[...boxes.values()].find(act),keys:()=>[...boxes.values()].filter(b=>b.children.length).map(b=>b.key),
    load:(box,e)=>loadOf(word(box.id,MODULE),e),isPicked:box=>box.kind==='op'&&!!G.picked&&G.picked[1]===step&&G.picked[2]===box.at,
    openTo:at=>ancestors(leaves[at]).forEach(b=>G.opened.add(b.key)),
    firstOpen,redraw,markPicked,zoomTo};

  function firstOpen(wanted){
    const keys=new Set(),open=box=>[...ancestors(box),box].forEach(b=>keys.add(b.key));
    let left=SHOWN;
    const inside=box=>{for(const c of box.children)if(c.experts||c.children.length&&c.kind!=='stack'&&(mark?c.changed:true)&&(left-=c.children.length)>0){keys.add(c.key);inside(c)}};
    const block=p.find(b=>wanted?b.path===wanted&&b.kind==='group':mark?b.kind==='op'&&b.changed:b.block);
    if(block){
      const top=mark&&!wanted?ancestors(block).at(-1)??block:block;
      open(mark&&!wanted?block.parent.parent?block.parent:block:block);
      inside(mark&&!wanted&&top.kind!=='stack'?top:block.kind==='op'?block.parent:block);
    }else inside(root);
    return[...keys];
  }
  function redraw(zoom=0){
    const room=frame.clientWidth-2,held=frame.firstChild&&[frame.scrollLeft,frame.scrollTop];
    const first=!p.zoom||zoom>0;
    if(zoom)p.zoom=zoom;
    else if(first){
      p.zoom=1;
      const width=+draw(root,p).getAttribute('width');
      p.zoom=Math.max(0.7,Math.min(1,room/width));
    }
    const picture=draw(root,p);
    frame.replaceChildren(picture);
    if(G.picked)markPicked();
    const box=picture.querySelector('[data-key][tabindex]');
    if(box)box.setAttribute('tabindex',0);
    if(held&&!first)[frame.scrollLeft,frame.scrollTop]=held;
    else{
      // At first the middle is shown, or what the pass changed.
      const seen=mark&&picture.querySelector(`.box.op.${mark}`)?.getBoundingClientRect(),place=frame.getBoundingClientRect();
      frame.scrollLeft=seen?seen.left+seen.width/2-place.left-room/2:(frame.scrollWidth-room)/2;
      if(seen)frame.scrollTop=seen.top-place.top-90;
    }
  }
  function zoomTo(z,at){
    const picture=frame.firstChild,b=frame.getBoundingClientRect(),inside=at&&at.clientX>=b.left&&at.clientX<b.right;
    const x=inside?at.clientX:b.left+b.width/2,y=inside?at.clientY:b.top+b.height/2,old=picture.getBoundingClientRect();
    for(const side of['width','height'])picture.setAttribute(side,picture.getAttribute(side)*z/p.zoom);
    p.zoom=z;
    const now=picture.getBoundingClientRect();
    frame.scrollLeft+=now.left+(x-old.left)/old.width*now.width-x;
    frame.scrollTop+=now.top+(y-old.top)/old.height*now.height-y;
  }
  // The mouse drags the picture; a finger does so anyway.
  let drag=null;
  function held(e){drag=e.button===0&&e.pointerType==='mouse'&&e.target!==frame?{x:e.clientX,y:e.clientY,moved:false}:null}
  function dragged(e){
    if(!drag||!(e.buttons&1))return;
    drag.moved||=Math.hypot(e.clientX-drag.x,e.clientY-drag.y)>4;
    if(!drag.moved)return;
    frame.setPointerCapture(e.pointerId);
    frame.scrollLeft-=e.clientX-drag.x;frame.scrollTop-=e.clientY-drag.y;
    Object.assign(drag,{x:e.clientX,y:e.clientY});
  }
  // The box that was picked, the arrows from it to all readers, and those from what it reads to it; or those of `values`.
  function markPicked(values){
    frame.querySelectorAll('.box.op').forEach(b=>b.classList.toggle('on',p.isPicked(boxes.get(b.dataset.key))));
    const leaf=G.picked?.[1]===step?leaves[G.picked[2]]:null,around=new Set(leaf?[leaf,...ancestors(leaf)].map(b=>b.key):[]);
    const made=values??(leaf?outputs(leaf.id).map(([v])=>v):[]),read=leaf?inputs(leaf.id):[];
    for(const edge of frame.querySelectorAll('.edge')){
      const towards=around.has(edge.dataset.to)||edge.dataset.to===OUT&&!around.has(edge.parentNode.dataset.key);
      edge.classList.toggle('on',made.some(v=>edge.values.has(v))||towards&&read.some(v=>edge.values.has(v)));
    }
  }
  // A box that opens stays where it is on the screen.
  function toggle(box){
    G.opened.has(box.key)?G.opened.delete(box.key):G.opened.add(box.key);
    const at=key=>frame.querySelector(`[data-key="${CSS.escape(key)}"]`),old=at(box.key).getBoundingClientRect();
    panes.forEach(x=>x.redraw());
    const now=at(box.key),place=now.getBoundingClientRect();
    frame.scrollTop+=place.top-old.top;
    frame.scrollLeft+=place.left-old.left;
    now.focus({preventScroll:true});
  }
  function act(node){
    const box=boxes.get(node.dataset.key);
    if(node.dataset.expert!==undefined)return showExpert(boxes.get(node.parentNode.dataset.key),+node.dataset.expert);
    if(box.kind==='op')pick(G.f,step,box.at);
    if(box.children.length||box.experts)toggle(box);
  }
  function clicked(event){
    const moved=drag?.moved;
    drag=null;
    if(moved)return;
    const node=event.target.closest('[role=button]'),box=boxes.get(node?.dataset.key);
    if(node&&(!box?.isOpen||!event.detail))return act(node); // without detail it is a screen reader's
    const{clientX:x,clientY:y}=event,near=[0,-1,1,-2,2,-3,3,-4,4].flatMap(d=>[[x+d,y],[x,y+d]]).map(at=>document.elementFromPoint(...at));
    const edge=near.find(e=>e?.matches('.edge')&&frame.contains(e)); // few hit a thin line
    if(edge){
      const values=[...edge.values];
      G.picked=null;
      panes.forEach(x=>x.markPicked(x===p?values:[]));
      valueDetails(G.f,step,values);
    }else if(node&&y-node.getBoundingClientRect().top<p.zoom*(HEAD+LEADING*box.lines.length))act(node);
  }
  function typed(event){
    const node=event.target.closest('[role=button]');
    if(!node||event.ctrlKey||event.metaKey||event.altKey)return;
    const list=[...frame.querySelectorAll('[role=button]')],at=list.indexOf(node),isOpen=node.getAttribute('aria-expanded');
    const move={ArrowDown:list[at+1],ArrowUp:list[at-1],Home:list[0],End:list.at(-1),
      ArrowRight:isOpen==='true'?list[at+1]:undefined,ArrowLeft:isOpen==='true'?undefined:node.parentNode.closest('[role=button]')}[event.key];
    if(event.key==='Enter'||event.key===' '||event.key==='ArrowRight'&&isOpen==='false'||event.key==='ArrowLeft'&&isOpen==='true')act(node);
    else if(move){move.focus({preventScroll:true});move.scrollIntoView({block:'nearest',inline:'nearest'})}
    else if(!/^(Arrow|Home|End)/.test(event.key))return;
    event.preventDefault();
    event.stopPropagation();
  }
  return p;
}
// One expert: what it holds, and how often it was chosen.
function showExpert(box,expert){
  const module=word(box.id,MODULE),block=R.blocks.find(b=>module.startsWith(`${b.name}.`)||module===b.name);
  const weights=[...new Set((box.weights??[]).map(arrayOf))].filter(Boolean);
  const load=loadOf(module,expert),size=weights.reduce((n,w)=>n+w.bytes,0);
  panel(`expert ${expert}`,facts([['of',block?block.name:module],['op',word(box.id,NAME)],
    ['router',block?.router],['activation',block?.activation],
    ['parameters',block&&block.experts?big(block.parameters/block.experts):''],
    ['weights here',size?`${bytes(size/box.experts)}, ${[...new Set(weights.map(w=>w.format))].join(', ')}`:''],
    ['load',load===null?'':`${load.toFixed(2)} times the mean`]]),
    load===null?'Its load comes from a recorded routing: --trace.':'');
}
